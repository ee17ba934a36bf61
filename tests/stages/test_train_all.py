"""What holds for `train clip`, `train vae` and `train unet` alike."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from commands import limner
from kills import kill, writes_of
from limner.artifacts import is_finished, read_json, sha256_folder
from limner.config import TrainClipConfig, TrainConfig, TrainUnetConfig, TrainVaeConfig
from limner.errors import DataError, ModelError, RunError, UserError
from limner.settings import resolve
from limner.stages import train_clip, train_unet, train_vae
from trainings import config, weights

TRAININGS: dict[str, tuple[ModuleType, type[TrainConfig], str]] = {
    "clip": (train_clip, TrainClipConfig, "data"),
    "vae": (train_vae, TrainVaeConfig, "data"),
    "unet": (train_unet, TrainUnetConfig, "latents"),
}
PARTS = {"clip": {"clip"}, "vae": {"vae"}, "unet": {"unet", "scheduler"}}


@dataclass(frozen=True)
class Training:
    """A stage, what it trains on here, and a finished run of it."""

    name: str
    stage: ModuleType
    cls: type[TrainConfig]
    data: Path
    finished: Path

    @property
    def run(self) -> Callable[[TrainConfig], Path]:
        """The stage's function."""
        run: Callable[[TrainConfig], Path] = self.stage.run
        return run

    def config(self, out: Path, **settings: Any) -> TrainConfig:
        """The smallest configuration."""
        return config(self.cls, settings.pop("data", self.data), out, **settings)


@pytest.fixture(params=list(TRAININGS))
def training(request: pytest.FixtureRequest) -> Training:
    """Each of the three stages."""
    stage, cls, data = TRAININGS[request.param]
    return Training(request.param, stage, cls, request.getfixturevalue(data), request.getfixturevalue(request.param))


def sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    """What the user reads: one sentence in one line."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# ---- what a run leaves


def test_the_result_is_a_part_of_a_diffusers_model(training: Training) -> None:
    assert {p.name for p in (training.finished / "model").iterdir()} == PARTS[training.name]
    suffixes = {p.suffix for p in training.finished.rglob("*") if p.is_file()}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".partial"}


def test_the_manifest_says_what_it_was_made_from_and_how_well(training: Training) -> None:
    manifest = read_json(training.finished / "manifest.json")
    assert set(manifest["parents"]) == {"data"}
    assert manifest["images"] == 32
    assert manifest["validation"]["loss"] > 0
    assert {"limner", "finished", "seconds", "hardware", "seed"} <= set(manifest)


def test_the_loss_gets_less(training: Training, tmp_path: Path) -> None:
    # White noise is found soonest; flow begins with a plateau, since its answer changes sign half-way.
    objective = {"objective": "eps"} if training.name == "unet" else {}
    every = {"validate_every": 640, "checkpoint_every": 640}
    longer = training.config(tmp_path / "r", images=640, lr=3e-3, **every, **objective)
    lines = [json.loads(line) for line in (training.run(longer) / "events.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 80
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


# ---- the same again


def test_a_finished_run_is_left_as_it_is(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    before = sha256_folder(training.finished)
    training.run(training.config(training.finished))
    assert "Nothing to do" in capsys.readouterr().out
    assert sha256_folder(training.finished) == before


def test_the_config_of_a_run_reproduces_it_to_the_bit(training: Training, tmp_path: Path) -> None:
    again = resolve(training.cls, {"out": tmp_path / "r"}, file=training.finished / "config.json")
    assert weights(training.run(again)) == weights(training.finished)


@pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL and forked workers")
def test_killed_and_resumed_it_ends_with_the_same_bits(training: Training, tmp_path: Path) -> None:
    count = writes_of(training.run, training.config(tmp_path / "whole"))
    assert weights(tmp_path / "whole") == weights(training.finished), "another process, the same bits"
    for part in (0.3, 0.7):
        killed = training.config(tmp_path / f"killed-{part}")
        kill(training.run, killed, at_write=int(part * count))
        assert not is_finished(killed.out)
        assert weights(training.run(killed)) == weights(training.finished)


def test_a_finished_run_goes_on_when_images_is_raised(training: Training, tmp_path: Path) -> None:
    run = training.run(training.config(tmp_path / "r", images=16))
    before = weights(run)
    training.run(training.config(tmp_path / "r", images=24))
    assert read_json(run / "manifest.json")["images"] == 24
    assert weights(run) != before
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if "loss" in line] == [8, 16, 24], "nothing is trained on twice"


def test_the_result_can_be_the_best_and_patience_ends_a_training(training: Training, tmp_path: Path) -> None:
    """At such a learning rate whatever is learned is soon lost again."""
    given = {"images": 400, "lr": 0.3, "ema_halflife": 0, "validate_every": 8, "result": "best", "patience": 2}
    run = training.run(training.config(tmp_path / "r", **given))
    manifest = read_json(run / "manifest.json")
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    losses = {line["images"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    assert manifest["stopped_early"]
    assert manifest["images"] == max(losses) == min(losses, key=losses.__getitem__) + 16
    assert manifest["validation"]["loss"] == min(losses.values())
    assert {p.name for p in (run / "model").iterdir()} == PARTS[training.name]


@pytest.mark.parametrize("training", ["vae"], indirect=True)
def test_auto_finds_numbers_and_the_run_is_that_with_them(
    training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searching = {"auto": True, "batch_size": None, "lr": None}
    out = tmp_path / "r"
    run = training.run(training.config(out, **searching))
    assert capsys.readouterr().out.startswith("auto found batch_size ")
    stored = read_json(run / "config.json")
    assert (stored["auto"], stored["batch_size"]) in ((False, 8), (False, 16))
    assert 1e-5 < stored["lr"] < 3e-2
    given = training.config(tmp_path / "given", batch_size=stored["batch_size"], lr=stored["lr"])
    assert weights(training.run(given)) == weights(run)
    capsys.readouterr()
    training.run(training.config(out, **searching))
    assert "auto found" not in capsys.readouterr().out


def test_bf16_trains_too(training: Training, tmp_path: Path) -> None:
    run = training.run(training.config(tmp_path / "r", precision="bf16"))
    assert read_json(run / "manifest.json")["validation"]["loss"] == pytest.approx(
        read_json(training.finished / "manifest.json")["validation"]["loss"], rel=0.1
    )
    assert set(weights(run)) == set(weights(training.finished))


def test_a_result_is_trained_further(training: Training, tmp_path: Path) -> None:
    run = training.run(training.config(tmp_path / "r", model=str(training.finished), images=16))
    assert set(read_json(run / "manifest.json")["parents"]) == {"data", "model"}
    assert {p.name for p in (run / "model").iterdir()} == PARTS[training.name]
    assert weights(run) != weights(training.finished)


# ---- the plan


def test_a_plan_writes_nothing(training: Training, tmp_path: Path) -> None:
    plan = training.stage.plan(training.config(tmp_path / "r"))
    assert list(tmp_path.iterdir()) == []
    assert plan["steps"] == "4 of 8 images"


# ---- mistakes: one sentence, and nothing is written


def refused(training: Training, error: type[UserError], out: Path, **settings: Any) -> str:
    """The sentence with which a training is refused, also by its plan; nothing is written."""
    said = []
    for call in (training.run, training.stage.plan):
        with pytest.raises(error) as caught:
            call(training.config(out, **settings))
        said.append(sentence(caught))
    assert not out.exists()
    assert said[0] == said[1]
    return said[0]


def test_missing_data_is_refused(training: Training, tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", training.finished):
        assert str(folder) in refused(training, DataError, tmp_path / "r", data=folder)


def test_a_model_without_the_part_is_refused(training: Training, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(training, ModelError, tmp_path / "r", model=str(tmp_path / "empty"))
    refused(training, ModelError, tmp_path / "r", model=str(tmp_path / "missing"))


def test_a_folder_of_something_else_is_left_alone(training: Training, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"a")
    with pytest.raises(RunError, match="not a run folder"):
        training.run(training.config(tmp_path / "photos"))
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_other_settings_are_refused_by_name(training: Training) -> None:
    before = sha256_folder(training.finished)
    with pytest.raises(RunError, match=r"other settings \(lr\)") as caught:
        training.run(training.config(training.finished, lr=0.5))
    sentence(caught)
    assert sha256_folder(training.finished) == before


def test_the_command_says_so_too(training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = limner("train", training.name, "--data", tmp_path / "missing", "--out", tmp_path / "r")
    assert code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("limner: ")
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
