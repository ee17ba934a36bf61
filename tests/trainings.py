"""Tiny trainings for tests: the smallest settings of each stage, and a task of a few dozen weights."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from limner.artifacts import sha256_folder
from limner.config import (
    EncodeConfig,
    StageConfig,
    TrainClipConfig,
    TrainConfig,
    TrainDistillConfig,
    TrainLoraConfig,
    TrainUnetConfig,
    TrainVaeConfig,
)
from limner.settings import resolve
from limner.training.loop import run_training
from limner.training.stream import Example, Stream

RECIPES = Path(__file__).parents[1] / "recipes"
SIDE = 16

C = TypeVar("C", bound=StageConfig)

TRAINING: dict[str, Any] = {
    "images": 32,
    "batch_size": 8,
    "lr": 1e-3,
    "warmup": 8,
    "threads": 1,
    "log_every": 8,
    "validate_every": 16,
    "checkpoint_every": 16,
}
CLIP = {"vocabulary": 600, "size": SIDE, "patch": 8, "width": 16, "layers": 1, "heads": 2, "features": 8}
VAE = {"channels": (8, 16)}
UNET = {"channels": (8, 16), "attention": (False, True), "head_width": 8}
SIZES: dict[type[StageConfig], dict[str, Any]] = {TrainClipConfig: CLIP, TrainVaeConfig: VAE, TrainUnetConfig: UNET}
"""Of new networks; one that is given has its own."""
SMALLEST: dict[type[StageConfig], dict[str, Any]] = {
    TrainConfig: TRAINING,
    TrainClipConfig: TRAINING | CLIP,
    TrainVaeConfig: TRAINING | VAE | {"size": SIDE, "perceptual_weight": 0},
    TrainUnetConfig: TRAINING | UNET,
    TrainDistillConfig: TRAINING,
    TrainLoraConfig: TRAINING | {"rank": 4},
    EncodeConfig: {"size": SIDE, "threads": 1},
}


def config(cls: type[C], data: Path, out: Path, **settings: Any) -> C:
    """The smallest configuration of a stage that reads `data` and writes `out`; a setting of None is left out."""
    others = SIZES.get(cls, {}) if settings.get("model") else {}
    smallest = {name: value for name, value in SMALLEST[cls].items() if name not in others}
    values = {"data": data, "out": out, **smallest, **settings}
    return resolve(cls, {name: value for name, value in values.items() if value is not None})


def run_recipe(name: str, *arguments: str, cwd: Path, **environment: str) -> str:
    """Run a recipe with the commands beside this Python, and without a network. -> what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(RECIPES / name), *arguments],
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", **environment},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(monkeypatch: pytest.MonkeyPatch, name: str, *words: object) -> None:
    """Run a recipe that is a Python script, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(RECIPES / name), run_name="__main__")


def shapes(folder: Path, count: int) -> Path:
    """A source of that many pictures of coloured shapes, as recipes/smoke draws them. -> `folder`."""
    runpy.run_path(str(RECIPES / "shapes.py"))["main"](folder, count)
    return folder


def weights(run: Path) -> dict[str, str]:
    """The sha256 of every weight file of a run's result."""
    hashes = sha256_folder(run / "model", "*.safetensors")
    assert hashes
    return hashes


class Summing:
    """A task of 205 weights: the sum of a picture's pixels. Some of its neurons are dropped at random."""

    dropout = 0.2

    def __init__(self, config: TrainConfig) -> None:
        self.network = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.Dropout(self.dropout),
            nn.Conv2d(4, 4, 3, padding=1),  # a kernel that lies otherwise in memory with channels last
            nn.Flatten(),
            nn.Linear(16, 1),
        )
        self.stream = Stream(20, config.seed, self._example)
        self.parents = {"data": "0" * 64}
        self.facts: dict[str, Any] = {}
        self.rates: dict[str, float] = {}

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        x = torch.from_numpy(rng.standard_normal((1, 4, 4), np.float32)) + index / 20
        return {"x": x, "y": x.sum()[None]}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error."""
        error = network(batch["x"]) - batch["y"]
        return error.square().mean(), {"furthest": error.abs().max()}

    def validate(self, samples: Path) -> dict[str, float]:
        """Squared error on the first examples."""
        (samples / "sample.txt").write_text("a sample")
        batch = {name: torch.stack([self.stream[k][name] for k in range(20)]) for name in ("x", "y")}
        return {"loss": self.loss(self.network, batch)[0].item()}

    def save(self, folder: Path) -> None:
        """Write `folder/net`."""
        (folder / "net").mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(tensors, folder / "net" / "net.safetensors")


def run_summing(config: TrainConfig) -> Path:
    """Train `Summing`, as a stage's `run` does."""
    return run_training(Summing, config)
