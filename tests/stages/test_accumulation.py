"""A batch, the same in parts, and the same shared by two processes train the same U-Net.

This file is also the program of those processes: `torchrun ... test_accumulation.py LATENTS OUT`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from limner.config import TrainUnetConfig
from limner.stages import train_unet
from processes import in_two_processes
from trainings import config


def train(latents: Path, out: Path, **given: Any) -> Path:
    """Twenty steps of eight images at the stage's own learning rate.

    Groups of two or three channels are normalised: before one of a channel a bias has no gradient but for rounding,
    which AdamW would make steps of full length of.
    """
    given = {"channels": (16, 24), "lr": None, "dropout": 0.2, **given}
    seldom = {"images": 160, "validate_every": 160, "checkpoint_every": 160, "ema_halflife": 0}
    return train_unet.run(config(TrainUnetConfig, latents, out, **seldom, **given))


def losses(run: Path) -> list[float]:
    """The training loss of each step."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.skipif(sys.platform != "linux", reason="forks workers")
def test_parts_and_processes_train_what_the_whole_does(latents: Path, tmp_path: Path) -> None:
    in_two_processes(__file__, str(latents), str(tmp_path / "two"))
    whole = train(latents, tmp_path / "whole")
    parts = train(latents, tmp_path / "parts", micro_batch_size=4)
    assert len(losses(whole)) == 20
    wanted = load_file(whole / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    for other in (parts, tmp_path / "two"):
        assert losses(other) == pytest.approx(losses(whole), abs=1e-6)
        found = load_file(other / "model" / "unet" / "diffusion_pytorch_model.safetensors")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            away = (found[name] - tensor).abs()
            # AdamW makes a step of nearly full length of a gradient that is next to nothing, rounding and all
            assert away.max() < 1e-4
            assert (away > 1e-5).float().mean() < 1e-3
    again = train(latents, tmp_path / "again", checkpointing=True)
    assert losses(again) == pytest.approx(losses(whole), abs=1e-6)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
