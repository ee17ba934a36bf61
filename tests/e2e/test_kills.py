"""A training of a U-Net that is killed at twenty moments ends with the bits of one that nobody disturbed."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kills import interrupt, writes_of
from limner.config import EncodeConfig, PrepareConfig, TrainUnetConfig
from limner.settings import resolve
from limner.stages import encode, prepare, train_unet
from tiny import tiny_model
from trainings import config, shapes, weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL and forked workers")

KILLS = 20
LAST = "000000048"


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent cache of shapes, by a VAE and a CLIP of random weights."""
    folder = tmp_path_factory.mktemp("kills")
    source = shapes(folder / "source", 24)
    values = {"kind": "imagefolder", "source": source, "out": folder / "data", "workers": 1, "val_share": 0.2}
    data = prepare.run(resolve(PrepareConfig, values))
    model = tiny_model(folder / "model")
    return encode.run(config(EncodeConfig, data, folder / "latents", clip=str(model), vae=str(model)))


def training(latents: Path, out: Path) -> TrainUnetConfig:
    """One with a checkpoint each step."""
    return config(TrainUnetConfig, latents, out, images=48, checkpoint_every=8, validate_every=24, ema_halflife=50)


def state(run: Path) -> dict[str, torch.Tensor]:
    """Weights, their average and the optimiser, as the last checkpoint has them."""
    return load_file(run / "checkpoints" / LAST / "state.safetensors")


def test_killed_at_twenty_moments_it_ends_with_the_same_bits(latents: Path, tmp_path: Path) -> None:
    """At a random write, most of which are of checkpoints, or after a random time; each time it is begun again."""
    count = writes_of(train_unet.run, training(latents, tmp_path / "whole"))
    started = time.monotonic()  # not before: the first process of all loads the libraries
    assert not interrupt(train_unet.run, training(latents, tmp_path / "timed"))
    seconds = time.monotonic() - started
    wanted = state(tmp_path / "whole")
    assert any(name.startswith("average.") for name in wanted)

    rng = random.Random(0)
    runs, killed = [training(latents, tmp_path / "0")], 0
    while killed < KILLS:
        if rng.random() < 0.4:
            moment: dict[str, Any] = {"at_write": rng.randint(1, count)}
        else:
            moment = {"seconds": rng.uniform(0, seconds)}
        if interrupt(train_unet.run, runs[-1], **moment):
            killed += 1
        else:
            runs.append(training(latents, tmp_path / str(len(runs))))
    for run in runs:
        train_unet.run(run)
        again = state(run.out)
        assert again.keys() == wanted.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
        assert weights(run.out) == weights(tmp_path / "whole")
