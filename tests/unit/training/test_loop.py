"""The training loop: what it leaves, when it ends, and that being killed or stopped changes nothing."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as within
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from kills import kill, writes_of
from limner.artifacts import Run, read_json, sha256_folder
from limner.config import TrainConfig
from limner.errors import ConfigError, RunError
from limner.settings import resolve
from limner.training import checkpoints
from limner.training.loop import learning_rate, plan_training, run_training
from limner.training.stream import Stream
from trainings import Summing, config, run_summing, weights

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL and forked workers")


def settings(out: Path, **given: Any) -> TrainConfig:
    """The configuration of a training of `Summing`."""
    return config(TrainConfig, Path("nowhere"), out, **given)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    return run_summing(settings(tmp_path_factory.mktemp("runs") / "finished"))


def events(run: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


# ---- what a run leaves


def test_a_run_leaves_what_was_promised(finished: Path) -> None:
    names = {"config.json", "manifest.json", "events.jsonl", "checkpoints", "samples", "model", "tensorboard"}
    assert {p.name for p in finished.iterdir()} == names | {".lock"}
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"000000016", "000000032", "best", "newest"}
    assert {p.name for p in (finished / "samples").iterdir()} == {"000000016", "000000032"}
    manifest = read_json(finished / "manifest.json")
    assert manifest["images"] == 32
    assert manifest["seed"] == 0
    assert manifest["parents"] == {"data": "0" * 64}
    assert manifest["validation"] == read_json(finished / "checkpoints" / "000000032" / "state.json")["validation"]


def test_figures_are_logged_as_often_as_asked(finished: Path) -> None:
    lines = events(finished)
    assert [line["images"] for line in lines if "loss" in line] == [8, 16, 24, 32]
    assert [line["images"] for line in lines if "validation/loss" in line] == [16, 32]
    assert {"loss", "lr", "gradient", "furthest", "seconds"} <= set(lines[0])
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([learning_rate(seen, settings(finished)) for seen in (0, 8, 16, 24)])


def test_training_helps(tmp_path: Path) -> None:
    run = run_summing(settings(tmp_path / "r", images=1_600, lr=1e-2, validate_every=400, log_every=1_600))
    losses = [line["validation/loss"] for line in events(run) if "validation/loss" in line]
    assert losses[-1] < losses[0] / 3


def test_the_best_checkpoint_is_the_best(tmp_path: Path) -> None:
    """At this learning rate the loss soon gets worse than it was."""
    run = run_summing(settings(tmp_path / "r", images=80, lr=0.5, validate_every=8, keep_checkpoints=1))
    losses = {line["images"]: line["validation/loss"] for line in events(run) if "validation/loss" in line}
    facts = read_json(run / "checkpoints" / "best" / "state.json")
    assert facts["images"] == min(losses, key=losses.__getitem__)
    assert facts["validation"]["loss"] == facts["best"] == min(losses.values())
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"000000080", "best", "newest"}


def test_the_result_is_the_average_and_training_goes_on_with_the_weights(tmp_path: Path) -> None:
    run = run_summing(settings(tmp_path / "r", ema_halflife=100))
    result = load_file(run / "model" / "net" / "net.safetensors")
    saved = load_file(run / "checkpoints" / "000000032" / "state.safetensors")
    names = [name for name, _ in Summing(settings(tmp_path)).network.named_parameters()]
    for number, name in enumerate(names):
        assert torch.equal(result[name], saved[f"average.{number}"])
        assert not torch.equal(result[name], saved[f"network.{name}"])


class Sure(Summing):
    """Without dropout, whose draws a compiler may make otherwise."""

    dropout = 0.0


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled_it_learns_the_same(tmp_path: Path) -> None:
    runs = [run_training(Sure, settings(tmp_path / str(done), compile=done)) for done in (False, True)]
    plain, compiled = (load_file(run / "model" / "net" / "net.safetensors") for run in runs)
    assert plain.keys() == compiled.keys(), "under the same names"
    for name, tensor in plain.items():
        assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_plan_times_what_would_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    for done in (False, True):
        plan_training(Sure, settings(tmp_path / "r", compile=done))
        assert len(compiled) == done


# ---- the best of a training that gets worse


def worsening(out: Path, **given: Any) -> TrainConfig:
    """At this learning rate the loss is least after 16 images, and always above that after the next validations."""
    values = {"images": 80, "lr": 0.2, "seed": 3, "ema_halflife": 8, "validate_every": 8, "result": "best", **given}
    return settings(out, **values)


def losses(run: Path) -> dict[int, float]:
    """The loss of each validation by the images seen."""
    return {line["images"]: line["validation/loss"] for line in events(run) if "validation/loss" in line}


def is_the_average_of(run: Path, checkpoint: str) -> bool:
    """Whether a run's result is the weight average of one of its checkpoints."""
    result = load_file(run / "model" / "net" / "net.safetensors")
    saved = load_file(run / "checkpoints" / checkpoint / "state.safetensors")
    names = [name for name, _ in Summing(settings(run)).network.named_parameters()]
    return all(torch.equal(result[name], saved[f"average.{number}"]) for number, name in enumerate(names))


def test_the_result_can_be_the_best_in_place_of_the_last(tmp_path: Path) -> None:
    best, last = (run_summing(worsening(tmp_path / result, result=result)) for result in ("best", "last"))
    assert losses(best) == losses(last)
    assert min(losses(best), key=losses(best).__getitem__) == 16
    assert is_the_average_of(best, "best")
    assert is_the_average_of(last, "000000080")
    for run, images in ((best, 16), (last, 80)):
        manifest = read_json(run / "manifest.json")
        assert manifest["validation"]["loss"] == losses(run)[images], "the figures are those of the result"
        assert (manifest["images"], manifest["stopped_early"]) == (80, False)


def test_cut_short_before_the_first_validation_the_best_is_what_there_is(tmp_path: Path) -> None:
    asked = worsening(tmp_path / "r", validate_every=1000, checkpoint_every=16)
    for at_write in range(3, 20):
        kill(run_summing, asked, at_write=at_write)
        if (tmp_path / "r" / "checkpoints" / "000000016").is_dir():
            break
    run = run_summing(asked.model_copy(update={"images": 8}))
    assert read_json(run / "manifest.json")["images"] == 16
    assert is_the_average_of(run, "000000016")


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_ends_a_training(tmp_path: Path, patience: int, capsys: pytest.CaptureFixture[str]) -> None:
    whole = losses(run_summing(worsening(tmp_path / "whole")))
    run = run_summing(worsening(tmp_path / "r", patience=patience))
    end = 16 + 8 * patience
    assert losses(run) == {images: loss for images, loss in whole.items() if images <= end}
    manifest = read_json(run / "manifest.json")
    assert (manifest["images"], manifest["stopped_early"]) == (end, True)
    assert is_the_average_of(run, "best")
    assert checkpoints.numbered(run / "checkpoints")[-1].name == f"{end:09d}"
    before = sha256_folder(run, "*.safetensors")
    for images in (80, 160):
        capsys.readouterr()
        run_summing(worsening(tmp_path / "r", patience=patience, images=images))
        said = capsys.readouterr().out
        assert f"Nothing to do: {run} stopped early after {end} images, {patience} validations in a row" in said
        assert said.count("\n") == 1
    assert sha256_folder(run, "*.safetensors") == before


def test_a_validation_that_brings_a_new_best_gives_new_patience(tmp_path: Path) -> None:
    """The loss rises twice, and then falls below what it was."""
    run = run_summing(worsening(tmp_path / "r", lr=0.1, seed=1, patience=4))
    by_images = losses(run)
    assert by_images[24] < by_images[32] < by_images[40], "a stretch without a new best"
    assert min(by_images, key=by_images.__getitem__) > 40
    assert list(by_images)[-1] == 80


def test_what_was_best_before_images_was_raised_still_counts(tmp_path: Path) -> None:
    run = run_summing(worsening(tmp_path / "r", images=24))
    before = losses(run)
    assert is_the_average_of(run, "best")
    run_summing(worsening(tmp_path / "r", images=64))
    after = losses(run)
    best = min(after, key=after.__getitem__)
    assert list(after) == [8, 16, 24, 32, 40, 48, 56, 64]
    assert best in before
    assert is_the_average_of(run, "best")
    assert read_json(run / "manifest.json")["validation"]["loss"] == after[best]


def test_patience_counts_on_where_images_was_raised(tmp_path: Path) -> None:
    run = run_summing(worsening(tmp_path / "r", images=24, patience=3))
    assert read_json(run / "manifest.json")["stopped_early"] is False
    run_summing(worsening(tmp_path / "r", images=80, patience=3))
    manifest = read_json(run / "manifest.json")
    assert manifest["stopped_early"]
    assert manifest["images"] == min(losses(run), key=losses(run).__getitem__) + 24


@linux
def test_killed_at_any_write_it_stops_at_the_same_place_with_the_same_best(tmp_path: Path) -> None:
    def wanted(name: str) -> TrainConfig:
        return worsening(tmp_path / name, patience=2, checkpoint_every=16, keep_checkpoints=1)

    count = writes_of(run_summing, wanted("whole"))
    whole = tmp_path / "whole"
    best = load_file(whole / "checkpoints" / "best" / "state.safetensors")
    for at_write in range(2, count + 1, 5):
        killed = wanted(f"killed-{at_write}")
        kill(run_summing, killed, at_write=at_write)
        assert weights(run_summing(killed)) == weights(whole), f"killed before write {at_write}"
        again = load_file(killed.out / "checkpoints" / "best" / "state.safetensors")
        assert all(torch.equal(best[name], again[name]) for name in best)
        assert {p.name for p in (killed.out / "checkpoints").iterdir()} == {"000000032", "best", "newest"}
        facts = [read_json(run / "checkpoints" / "000000032" / "state.json") for run in (whole, killed.out)]
        assert facts[0] == facts[1]


@linux
def test_schedule_free_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    given = {"optimizer": "schedule-free", "ema_halflife": None, "checkpoint_every": 8, "lr": 1e-2}
    whole = run_summing(settings(tmp_path / "whole", **given))
    killed = settings(tmp_path / "r", **given)
    for at_write in (20, 24):
        kill(run_summing, killed, at_write=at_write)
    assert weights(run_summing(killed)) == weights(whole)
    assert is_the_average_of(whole, "000000032")
    saved = load_file(whole / "checkpoints" / "000000032" / "state.safetensors")
    assert not torch.equal(saved["average.0"], saved["network.0.weight"]), "where gradients are taken is no result"


def test_a_network_that_can_not_recompute_is_refused_before_any_work(tmp_path: Path) -> None:
    for call in (run_training, plan_training):
        with pytest.raises(ConfigError, match="leave out checkpointing"):
            call(Summing, settings(tmp_path / "r", checkpointing=True))
        with pytest.raises(ConfigError, match="needs a CUDA GPU"):
            call(Summing, settings(tmp_path / "r", optimizer="adamw-8bit"))
    assert list(tmp_path.iterdir()) == []


@linux
def test_muon_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    given = {"optimizer": "muon", "checkpoint_every": 8, "lr": 1e-2}
    whole = run_summing(settings(tmp_path / "whole", **given))
    killed = settings(tmp_path / "r", **given)
    for at_write in (20, 24, 12):
        kill(run_summing, killed, at_write=at_write)
    assert weights(run_summing(killed)) == weights(whole)
    assert weights(whole) != weights(run_summing(settings(tmp_path / "adamw", **given | {"optimizer": "adamw"})))


# ---- a part of the weights


class Partly(Summing):
    """The first kernel is frozen, and the last layer learns at a tenth of the rate; there are buffers too."""

    share = 0.1

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.network.insert(2, nn.BatchNorm2d(4))
        self.network[0].requires_grad_(False)
        self.rates = {"6.weight": self.share, "6.bias": self.share}


class Halted(Partly):
    """Its last layer does not learn at all."""

    share = 0.0


FROZEN = {"0.weight", "0.bias"}
TRAINED = {"2.weight", "2.bias", "4.weight", "4.bias", "6.weight", "6.bias"}
BUFFERS = {"2.running_mean", "2.running_var", "2.num_batches_tracked"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_weights_stay_and_are_not_stored(tmp_path: Path, optimizer: str) -> None:
    given = settings(tmp_path / "r", optimizer=optimizer, images=16)
    run = run_training(Partly, given)
    run_training(Partly, given.model_copy(update={"images": 32}))
    stored = set(load_file(run / "checkpoints" / "000000032" / "state.safetensors"))
    assert {name.removeprefix("network.") for name in stored if name.startswith("network.")} == TRAINED | BUFFERS
    assert {name for name in stored if name.startswith("average.")} == {f"average.{number}" for number in range(6)}
    assert {name.split(".")[1] for name in stored if name.startswith("optimizer.")} == set("012345")
    torch.manual_seed(given.seed)
    first = Partly(given).network.state_dict()
    result = load_file(run / "model" / "net" / "net.safetensors")
    assert {name for name in FROZEN | TRAINED if torch.equal(first[name], result[name])} == FROZEN


def test_a_share_of_the_learning_rate_is_kept_to(tmp_path: Path) -> None:
    given = settings(tmp_path / "r", ema_halflife=0)
    torch.manual_seed(given.seed)
    first = Halted(given).network.state_dict()
    moved = {}
    for task in (Partly, Halted):
        run = run_training(task, given.model_copy(update={"out": tmp_path / task.__name__}))
        result = load_file(run / "model" / "net" / "net.safetensors")
        moved[task] = {name: (result[name] - first[name]).abs().max().item() for name in TRAINED}
    assert moved[Halted]["6.weight"] == moved[Halted]["6.bias"] == 0
    assert 0 < 5 * moved[Partly]["6.weight"] < moved[Partly]["4.weight"]


# ---- the same again


@pytest.mark.parametrize("given", [{}, {"workers": 2}, {"log_every": 3, "checkpoint_every": 24, "keep_checkpoints": 1}])
def test_what_does_not_count_changes_no_bit(tmp_path: Path, finished: Path, given: dict[str, int]) -> None:
    assert weights(run_summing(settings(tmp_path / "r", **given))) == weights(finished)


def test_the_config_of_a_run_reproduces_it(tmp_path: Path, finished: Path) -> None:
    again = resolve(TrainConfig, {"out": tmp_path / "r"}, file=finished / "config.json")
    assert weights(run_summing(again)) == weights(finished)


def test_another_seed_gives_another_result(tmp_path: Path, finished: Path) -> None:
    assert weights(run_summing(settings(tmp_path / "r", seed=1))) != weights(finished)


def test_a_training_in_bf16_after_one_in_fp32_in_the_same_process(tmp_path: Path, finished: Path) -> None:
    run = run_summing(settings(tmp_path / "r", precision="bf16"))
    assert weights(run) != weights(finished)
    assert math.isfinite(read_json(run / "manifest.json")["validation"]["loss"])


# ---- killed and resumed


@linux
def test_killed_at_any_write_it_ends_with_the_same_bits(tmp_path: Path, finished: Path) -> None:
    """`kill -9` before every third thing that a run writes; then the same command again."""
    count = writes_of(run_summing, settings(tmp_path / "whole"))
    assert weights(tmp_path / "whole") == weights(finished), "another process, the same bits"
    assert count > 50
    for at_write in range(1, count + 1, 3):
        killed = settings(tmp_path / f"killed-{at_write}")
        kill(run_summing, killed, at_write=at_write)
        assert weights(run_summing(killed)) == weights(finished), f"killed before write {at_write}"


@linux
def test_killed_again_and_again_it_still_ends_with_the_same_bits(tmp_path: Path, finished: Path) -> None:
    killed = settings(tmp_path / "r", checkpoint_every=8)
    for at_write in (12, 22, 22, 11):
        kill(run_summing, killed, at_write=at_write)
    assert len(checkpoints.numbered(tmp_path / "r" / "checkpoints")) == 2
    assert weights(run_summing(killed)) == weights(finished)


@linux
def test_a_damaged_checkpoint_costs_time_and_no_bit(
    tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed = settings(tmp_path / "r", checkpoint_every=8)
    kill(run_summing, killed, at_write=40)
    newest = checkpoints.numbered(tmp_path / "r" / "checkpoints")[-1]
    os.truncate(newest / "state.safetensors", 100)
    assert weights(run_summing(killed)) == weights(finished)
    assert f"{newest.name} is damaged" in caplog.text


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sha256_folder(finished)
    for images in (32, 16):
        assert run_summing(settings(finished, images=images)) == finished
        assert "Nothing to do" in capsys.readouterr().out
        assert {name: h for name, h in sha256_folder(finished).items() if "tensorboard" not in name} == {
            name: h for name, h in before.items() if "tensorboard" not in name
        }


def test_a_finished_run_goes_on_when_images_is_raised(tmp_path: Path) -> None:
    run = run_summing(settings(tmp_path / "r"))
    before = weights(run)
    assert run_summing(settings(tmp_path / "r", images=48)) == run
    assert [line["images"] for line in events(run) if "loss" in line] == [8, 16, 24, 32, 40, 48]
    assert read_json(run / "manifest.json")["images"] == 48
    assert weights(run) != before


# ---- a disk that fills up, a network that overfits


class Filling(Summing):
    """From the second validation on no file may be larger than a checkpoint of it is."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.network.append(nn.Identity())
        self.network[-1].register_parameter("ballast", nn.Parameter(torch.zeros(100_000)))
        self.validations = 0

    def validate(self, samples: Path) -> dict[str, float]:
        self.validations += 1
        if self.validations == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return super().validate(samples)


class Roomy(Filling):
    """The same where there is room."""

    def validate(self, samples: Path) -> dict[str, float]:
        return Summing.validate(self, samples)


@linux
def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    chosen = settings(tmp_path / "r")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="000000032"):
            run_training(Filling, chosen)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {p.name for p in (tmp_path / "r" / "checkpoints").iterdir()} == {"000000016", "best", "newest"}
    assert not (tmp_path / "r" / "model").exists()
    again = run_training(Roomy, chosen)
    assert weights(again) == weights(run_training(Roomy, settings(tmp_path / "whole")))
    assert [line["images"] for line in events(again) if "loss" in line] == [8, 16, 24, 32]


class Overfitting(Summing):
    """Its loss falls with each step, and that of validation rises with each validation but for the first."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.steps = self.validations = 0

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = super().loss(network, batch)
        self.steps += 1
        return loss * 0 + 9 / self.steps, figures

    def validate(self, samples: Path) -> dict[str, float]:
        self.validations += 1
        return {"loss": abs(self.validations - 2.5)}


@pytest.mark.parametrize(
    ("result", "said"), [("last", "is what result=best would take"), ("best", "becomes the result")]
)
def test_overfitting_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, result: str, said: str) -> None:
    run = run_training(Overfitting, settings(tmp_path / "r", images=80, validate_every=8, result=result))
    (record,) = [r for r in caplog.records if "by heart" in r.getMessage()]
    assert f"checkpoints/best, after 16 images, {said}" in record.getMessage().replace("is what becomes", "becomes")
    assert read_json(run / "checkpoints" / "best" / "state.json")["images"] == 16
    lines = events(run)
    trained = {line["images"]: line["loss"] for line in lines if "loss" in line}
    gaps = {line["images"]: line["gap"] for line in lines if "gap" in line}
    validated = {line["images"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    assert gaps == pytest.approx({images: loss - trained[images] for images, loss in validated.items()})


class Copying(Summing):
    """These shares of what it draws are copies, validation by validation."""

    shares = (0.0, 0.1, 0.2, 0.3, 0.0, 0.5)

    def validate(self, samples: Path) -> dict[str, float]:
        return {**super().validate(samples), "copies": self.shares[int(samples.name) // 8 - 1]}


def test_copies_are_said_when_they_begin(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_training(Copying, settings(tmp_path / "r", images=48, validate_every=8))
    said = [r.getMessage().split(" of what")[0] for r in caplog.records if "copies" in r.getMessage()]
    assert said == ["After 24 images 20 %", "After 48 images 50 %"]
    assert [line["validation/copies"] for line in events(run) if "validation/copies" in line] == list(Copying.shares)


# ---- what goes wrong


class Breaking(Summing):
    """Its loss or its gradient is no number at the step after `good`."""

    def __init__(self, config: TrainConfig, *, what: str, good: int = 2) -> None:
        super().__init__(config)
        self.what, self.good, self.steps = what, good, 0

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = super().loss(network, batch)
        self.steps += self.network.training and len(batch["x"]) == 8  # validation and measuring count for nothing
        if self.steps == self.good + 1:
            zero = loss - loss.detach()
            loss = loss * torch.nan if self.what == "loss" else loss.detach() + zero.abs().sqrt()  # slope 0 * inf
        return loss, figures


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_the_run_and_the_last_checkpoint_is_good(tmp_path: Path, what: str) -> None:
    broken = settings(tmp_path / "r", checkpoint_every=8)
    with pytest.raises(RunError) as caught:
        run_training(lambda c: Breaking(c, what=what), broken)
    assert str(caught.value) == (
        f"The {what} became nan after 16 images, and what was kept before that is left as it is; "
        "lower lr (0.001) or clip_norm (1), and start in a new folder."
    )
    folder = tmp_path / "r" / "checkpoints"
    assert [p.name for p in checkpoints.numbered(folder)] == ["000000008", "000000016"]
    assert not (tmp_path / "r" / "model").exists()
    run = run_summing(broken)  # without the fault: all of the checkpoint is there
    assert weights(run) == weights(run_summing(settings(tmp_path / "whole", checkpoint_every=8)))


def test_nan_leaves_the_best_checkpoint_whole_under_patience(tmp_path: Path) -> None:
    """The best is after 16 images, and the fourth step is the one that fails."""
    broken = worsening(tmp_path / "r", patience=3, precision="bf16")
    with pytest.raises(RunError, match=r"after 24 images.*lower lr \(0\.2\).*precision=fp32"):
        run_training(lambda c: Breaking(c, what="loss", good=3), broken)
    whole = run_summing(worsening(tmp_path / "whole", patience=3, precision="bf16"))
    kept, wanted = (load_file(run / "checkpoints" / "best" / "state.safetensors") for run in (broken.out, whole))
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    assert weights(run_summing(broken)) == weights(whole)


class Blind(Summing):
    """Its validation can't tell."""

    def validate(self, samples: Path) -> dict[str, float]:
        return {"loss": math.nan}


def test_a_validation_that_is_nan_stops_the_run_too(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"The validation loss became nan after 16 images.*lower lr"):
        run_training(Blind, settings(tmp_path / "r"))
    assert not (tmp_path / "r" / "checkpoints").exists()
    assert not [name for line in events(tmp_path / "r") for name in line if "validation" in name]


class Weighted(Summing):
    """Its loss in training is three times what validation counts."""

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        error, _ = super().loss(network, batch)
        return 3 * error, {"error": error}


def test_what_is_weighted_in_training_alone_is_not_taken_for_a_gap(tmp_path: Path) -> None:
    run = run_training(Weighted, settings(tmp_path / "r", images=16))
    *steps, last = events(run)
    errors = [line["error"] for line in steps]
    assert [line["loss"] for line in steps] == pytest.approx([3 * error for error in errors])
    assert last["gap"] == pytest.approx(last["validation/loss"] - sum(errors) / len(errors))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=r"^seed: input should be"):
        settings(Path("r"), seed=seed)


def test_other_settings_and_other_data_are_refused_by_name(tmp_path: Path) -> None:
    run_summing(settings(tmp_path / "r", images=8))
    with pytest.raises(RunError, match=r"other settings \(lr, seed\)"):
        run_summing(settings(tmp_path / "r", images=8, lr=0.5, seed=1))

    def of_other_data(config: TrainConfig) -> Summing:
        task = Summing(config)
        task.parents = {"data": "1" * 64}
        return task

    with pytest.raises(RunError, match="other contents of data"):
        run_training(of_other_data, settings(tmp_path / "r", images=8))


# ---- the plan


def test_a_plan_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    plan = plan_training(Summing, settings(tmp_path / "r"))
    assert list(tmp_path.iterdir()) == []
    assert plan["examples"] == "20, each seen about 1.6 times"
    assert plan["steps"] == "4 of 8 images"
    assert plan["trains"].endswith("fp32 on cpu")
    assert set(plan) == {"trains", "examples", "steps", "memory", "checkpoint", "time", "out"}


# ---- the learning rate, and what decays


@within(max_examples=40)
@given(st.integers(1, 64), st.integers(1, 100), st.integers(0, 3_000) | st.just(0), st.floats(0, 1))
def test_a_cosine_falls_from_the_end_of_the_rise_and_a_constant_rate_does_not(
    batch_size: int, steps: int, warmup: int, final: float
) -> None:
    """Beside PyTorch's own, which counts steps."""
    images = batch_size * steps
    given = {"images": images, "batch_size": batch_size, "warmup": warmup, "final_lr": final, "lr": 2.0}
    constant, cosine = (settings(Path("r"), **given, schedule=schedule) for schedule in ("constant", "cosine"))
    for seen in range(0, images, batch_size):
        rise = min(1.0, (seen + batch_size) / max(warmup, 1))
        assert learning_rate(seen, constant) == pytest.approx(2 * rise)
        if seen < warmup:
            assert learning_rate(seen, cosine) == pytest.approx(2 * rise)
    if warmup == 0:
        parameter = torch.nn.Parameter(torch.zeros(()))
        optimizer = torch.optim.SGD([parameter], lr=2.0)
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=2 * final)
        for seen in range(0, images, batch_size):
            assert learning_rate(seen, cosine) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6, abs=1e-9)
            optimizer.step()
            theirs.step()


@given(st.integers(1, 64), st.integers(1, 400), st.integers(0, 3_000), st.floats(0, 1))
def test_the_learning_rate_rises_stays_and_falls(batch_size: int, steps: int, warmup: int, final: float) -> None:
    images = batch_size * steps
    c = settings(Path("r"), images=images, batch_size=batch_size, warmup=warmup, final_lr=final, lr=2.0)
    rates = {seen: learning_rate(seen, c) for seen in range(0, images, batch_size)}
    assert all(0 < rate <= 2.0 for rate in rates.values())
    rising = [rate for seen, rate in rates.items() if seen <= 0.7 * images]
    assert rising == sorted(rising)
    falling = [rate for seen, rate in rates.items() if seen >= max(0.7 * images, warmup)]
    assert falling == sorted(falling, reverse=True)
    for seen, rate in rates.items():
        if warmup <= seen <= 0.69 * images:
            assert rate == 2.0
        if seen + batch_size < warmup and seen <= 0.69 * images:
            assert rate == pytest.approx(2.0 * (seen + batch_size) / warmup)
    if warmup <= images - batch_size:  # what is left at the end goes to final_lr as the last step becomes small
        share = min(1.0, batch_size / (0.3 * images))
        assert rates[images - batch_size] == pytest.approx(2.0 * (final + (1 - final) * share))


def test_the_run_folder_is_that_of_artifacts(finished: Path) -> None:
    assert Run(finished).finished
    assert isinstance(Summing(settings(finished)).stream, Stream)
