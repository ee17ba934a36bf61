"""Figures reach every tracker that is set; one whose package is missing is refused before any work."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, get_args

import pytest
from accelerate.tracking import get_available_trackers

from kills import kill, writes_of
from limner.config import TrainConfig
from limner.config.training import Tracker
from limner.errors import ConfigError
from limner.training import processes
from limner.training.journal import Journal
from limner.training.loop import plan_training, run_training
from trainings import Summing, config, run_summing

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL")
MISSING = [name for name in get_args(Tracker) if name not in map(str, get_available_trackers())]


def settings(out: Path, **given: Any) -> TrainConfig:
    """The configuration of a training."""
    return config(TrainConfig, Path("nowhere"), out, **given)


def lines(run: Path) -> list[dict[str, Any]]:
    """Those of events.jsonl."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def scalars(run: Path, name: str) -> list[Any]:
    """Those that TensorBoard shows of a run by this name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    shown: list[Any] = found.Scalars(name)
    return shown


def test_tensorboard_has_what_events_have(tmp_path: Path) -> None:
    run = run_summing(settings(tmp_path / "r"))
    assert len(list((run / "tensorboard").iterdir())) == 1
    for name in ("loss", "validation/loss", "gap"):
        wanted = {line["images"]: line[name] for line in lines(run) if name in line}
        assert {event.step: event.value for event in scalars(run, name)} == pytest.approx(wanted, rel=1e-6)


def test_without_trackers_events_are_left(tmp_path: Path) -> None:
    run = run_summing(settings(tmp_path / "r", trackers=()))
    assert not (run / "tensorboard").exists()
    assert [line["images"] for line in lines(run) if "loss" in line] == [8, 16, 24, 32]


@linux
def test_what_comes_again_after_a_kill_is_there_once(tmp_path: Path) -> None:
    count = writes_of(run_summing, settings(tmp_path / "whole", checkpoint_every=16))
    for at_write in range(3, count, 4):
        asked = settings(tmp_path / str(at_write), checkpoint_every=16)
        kill(run_summing, asked, at_write=at_write)
        run_summing(asked)
        for name in ("loss", "validation/loss"):
            seen = [[line["images"] for line in lines(run) if name in line] for run in (asked.out, tmp_path / "whole")]
            assert seen[0] == seen[1], f"killed before write {at_write}"


def test_tensorboard_has_what_comes_again_once(tmp_path: Path) -> None:
    for seen, written in ((0, (8, 16, 24)), (16, (24, 32))):  # the first killed after a checkpoint at 16
        accelerator = processes.join(tmp_path)
        journal = Journal(tmp_path, settings(tmp_path), accelerator, seen)
        for images in written:
            journal.write(images, {"loss": seen + images})
        accelerator.end_training()
    assert [(event.step, event.value) for event in scalars(tmp_path, "loss")] == [(8, 8), (16, 16), (24, 40), (32, 48)]


class Endless(Summing):
    """A figure of its validation is infinite, as the PSNR of a perfect picture is."""

    def validate(self, samples: Path) -> dict[str, float]:
        return {**super().validate(samples), "psnr": math.inf}


def test_every_line_is_json_after_a_line_that_was_cut_too(tmp_path: Path) -> None:
    def no_json(constant: str) -> NoReturn:
        raise ValueError(constant)

    run = run_training(Endless, settings(tmp_path / "r", images=16))
    with (run / "events.jsonl").open("a") as file:
        file.write('{"images": 24, "lo')
    run_training(Endless, settings(tmp_path / "r", images=32))
    found = [json.loads(line, parse_constant=no_json) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [line["images"] for line in found if "loss" in line] == [8, 16, 24, 32]
    assert [line["validation/psnr"] for line in found if "validation/psnr" in line] == [None, None]


@pytest.mark.skipif(not MISSING, reason="every tracker is installed")
def test_a_tracker_without_its_package_is_refused_before_any_work(tmp_path: Path) -> None:
    def make(config: TrainConfig) -> Summing:
        raise AssertionError("work was begun")

    chosen = settings(tmp_path / "r", trackers=("tensorboard", MISSING[0]))
    for call in (run_training, plan_training):
        with pytest.raises(ConfigError, match=rf"^trackers has {MISSING[0]}, .* pip install {MISSING[0]}; or .*\.$"):
            call(make, chosen)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_named() -> None:
    with pytest.raises(ConfigError, match=r"trackers.*'wandb'.*'paper'"):
        settings(Path("r"), trackers=("paper",))


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
def test_wandb_gets_figures_and_settings_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_summing(settings(tmp_path / "r", trackers=("wandb",)))
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert {
        name for name in ("limner", "batch_size", "validation/loss", "gap") if name.encode() not in content
    } == set()
