"""The training loop: what it leaves, when it ends, and that being killed or stopped changes nothing."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kills import kill, writes_of
from limner.artifacts import Run, read_json, sha256_folder
from limner.config import TrainConfig
from limner.errors import RunError
from limner.settings import resolve
from limner.training import checkpoints
from limner.training.loop import _groups, learning_rate, plan_training, run_training
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
    assert {p.name for p in finished.iterdir()} == names
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"000000016", "000000032", "best"}
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
    assert {"loss", "lr", "gradient", "error", "seconds"} <= set(lines[0])
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
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"000000080", "best"}


def test_the_result_is_the_average_and_training_goes_on_with_the_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = run_summing(settings(tmp_path / "r", ema_halflife=100))
    result = load_file(run / "model" / "net" / "net.safetensors")
    saved = load_file(run / "checkpoints" / "000000032" / "state.safetensors")
    names = [name for name, _ in Summing(settings(tmp_path)).network.named_parameters()]
    for number, name in enumerate(names):
        assert torch.equal(result[name], saved[f"average.{number}"])
        assert not torch.equal(result[name], saved[f"network.{name}"])


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
    for at_write in (12, 20, 20, 9):
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
    assert run_summing(settings(finished)) == finished
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


# ---- what goes wrong


class Breaking(Summing):
    """Its loss or its gradient is no number at the third step."""

    def __init__(self, config: TrainConfig, *, what: str) -> None:
        super().__init__(config)
        self.what, self.steps = what, 0

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = super().loss(network, batch)
        self.steps += self.network.training  # validation counts for nothing
        if self.steps == 3:
            zero = loss - loss.detach()
            loss = loss * torch.nan if self.what == "loss" else loss.detach() + zero.abs().sqrt()  # slope 0 * inf
        return loss, figures


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_the_run_and_the_last_checkpoint_is_good(tmp_path: Path, what: str) -> None:
    broken = settings(tmp_path / "r", checkpoint_every=8)
    with pytest.raises(RunError, match=f"The {what} became nan after 16 images; .* Lower lr") as caught:
        run_training(lambda c: Breaking(c, what=what), broken)
    assert "\n" not in str(caught.value)
    folder = tmp_path / "r" / "checkpoints"
    assert [p.name for p in checkpoints.numbered(folder)] == ["000000008", "000000016"]
    assert not (tmp_path / "r" / "model").exists()
    run = run_summing(broken)  # without the fault: all of the checkpoint is there
    assert weights(run) == weights(run_summing(settings(tmp_path / "whole", checkpoint_every=8)))


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


def test_only_matrices_and_kernels_decay() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Linear(4, 2))
    network[2].weight.requires_grad_(False)
    decayed, kept = _groups(network, 0.1)
    assert [p.shape for p in decayed["params"]] == [(3, 2, 3, 3)]
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    assert len(kept["params"]) == 4


def test_the_run_folder_is_that_of_artifacts(finished: Path) -> None:
    assert Run(finished).finished
    assert isinstance(Summing(settings(finished)).stream, Stream)
