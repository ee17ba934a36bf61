"""Two processes train what one does, and only the main one writes.

This file is also the program that they run: `python test_processes.py ANSWERS SETTINGS...` trains a task of `TASKS`
with each settings in turn, which are JSON, and notes in the folder ANSWERS what its process was told.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from limner.artifacts import read_json
from limner.config import TrainConfig
from limner.errors import UserError
from limner.training import checkpoints
from limner.training.loop import run_training
from processes import in_two_processes
from trainings import Summing, config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks workers")

WORSENING = {"images": 80, "lr": 0.2, "seed": 3, "ema_halflife": 8, "validate_every": 8, "result": "best"}


class Plain(Summing):
    """Without dropout, whose draws depend on the process; part of it is frozen."""

    dropout = 0.0

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.network[0].bias.requires_grad_(False)

    def validate(self, samples: Path) -> dict[str, float]:
        """Only the main process gets here."""
        assert os.environ.get("RANK", "0") == "0"
        return super().validate(samples)


class Failing(Plain):
    """Its loss is no number for the examples of the second process alone."""

    def loss(self, network: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, figures = super().loss(network, batch)
        return loss * (torch.nan if os.environ.get("RANK") == "1" else 1), figures


TASKS = {"plain": Plain, "failing": Failing}


def settings(out: Path, **given: Any) -> TrainConfig:
    """The configuration of a training."""
    return config(TrainConfig, Path("nowhere"), out, **given)


def two_processes(folder: Path, *trainings: dict[str, Any]) -> tuple[list[list[str]], str]:
    """Run the trainings in two processes. -> what each of the two was told about each training, and their output."""
    answers = folder / "answers"
    answers.mkdir()
    told = in_two_processes(__file__, str(answers), *(json.dumps(each, default=str) for each in trainings))
    return [(answers / str(rank)).read_text().splitlines() for rank in range(2)], told


def same_result(one: Path, other: Path) -> None:
    """Assert that two runs ended alike, and logged alike, to 1e-5."""
    results = [load_file(run / "model" / "net" / "net.safetensors") for run in (one, other)]
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        assert_close(tensor, results[1][name], rtol=1e-5, atol=1e-5)
    lines = [[json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()] for run in (one, other)]
    for figure in ("loss", "gradient", "lr", "validation/loss"):
        values = [{line["images"]: line[figure] for line in each if figure in line} for each in lines]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    manifests = [read_json(run / "manifest.json") for run in (one, other)]
    assert all(manifests[0][name] == manifests[1][name] for name in ("images", "stopped_early", "seed"))
    assert {p.name for p in (one / "checkpoints").iterdir()} == {p.name for p in (other / "checkpoints").iterdir()}


def test_two_processes_refuse_alike_and_train_what_one_does(tmp_path: Path) -> None:
    whole = run_training(Plain, settings(tmp_path / "whole", **WORSENING, patience=2, keep_checkpoints=1))
    before = run_training(Plain, settings(tmp_path / "before", images=8))
    told, output = two_processes(
        tmp_path,
        {"out": tmp_path / "uneven", "batch_size": 9},
        {"out": tmp_path / "auto", "auto": True, "lr": None},
        {"out": before, "images": 16, "lr": 0.5},
        {"out": tmp_path / "two", **WORSENING, "patience": 2, "keep_checkpoints": 1},
    )
    assert told[0] == told[1]
    assert told[0] == [
        "batch_size 9 can't be split evenly among 2 processes; choose a multiple.",
        "auto searches with one process; give batch_size and lr to several.",
        f"{before} was started with other settings (lr); repeat that command to resume it, or choose another --out.",
        str(tmp_path / "two"),
    ]
    assert not (tmp_path / "uneven").exists()
    assert not (tmp_path / "auto").exists()
    assert output.splitlines() == [str(tmp_path / "two" / "model")], "only the main process prints"
    same_result(tmp_path / "two", whole)
    assert read_json(whole / "manifest.json")["stopped_early"]
    events = list((tmp_path / "two" / "tensorboard").rglob("events*"))
    assert len(events) == 1, "only the main process logs"
    images = [json.loads(line)["images"] for line in (tmp_path / "two" / "events.jsonl").read_text().splitlines()]
    assert len(images) == 2 * len(set(images)), "a line for the step and one for the validation"


def test_two_processes_go_on_where_one_stopped_and_in_parts_of_their_shares(tmp_path: Path) -> None:
    given = {"optimizer": "muon", "lr": 0.01, "final_lr": 1.0}  # so that the rate does not depend on where it ends
    whole = run_training(Plain, settings(tmp_path / "whole", **given))
    run_training(Plain, settings(tmp_path / "r", **given, images=16))
    two_processes(tmp_path, {"out": tmp_path / "r", **given, "micro_batch_size": 2})
    same_result(tmp_path / "r", whole)


def test_nan_in_one_process_stops_both(tmp_path: Path) -> None:
    told, _ = two_processes(tmp_path, {"task": "failing", "out": tmp_path / "r"})
    assert told[0] == told[1]
    assert "The loss became nan after 0 images" in told[0][0]
    assert checkpoints.numbered(tmp_path / "r" / "checkpoints") == []


def main(answers: Path, *trainings: str) -> None:
    """Train one after the other, and note the run folder or the sentence of an error in `answers`/RANK."""
    with (answers / os.environ["RANK"]).open("w") as file:
        for text in trainings:
            given = json.loads(text)
            task = TASKS[given.pop("task", "plain")]
            try:
                said = str(run_training(task, settings(Path(given.pop("out")), **given)))
            except UserError as error:
                said = str(error)
            print(said, file=file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
