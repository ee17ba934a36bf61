"""A U-Net that draws what it was shown is noticed by its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from limner.config import TrainUnetConfig
from limner.data.latents import LatentCache
from limner.models import vae as vaes
from limner.stages.train_unet import ASKED, TrainUnet
from limner.training.copied import Shown
from limner.training.encoded import Encoded
from trainings import config


def stored(encoded: Encoded, cache: LatentCache, index: int, view: int) -> Tensor:
    """The latents of a stored view (1, C, h, w)."""
    return vaes.to_latents(encoded.vae_config, cache.view(index, view)[None].chunk(2, dim=1)[0])


@pytest.mark.parametrize("cached", ["latents", "bucketed"])
def test_every_view_of_a_train_picture_is_known_and_noise_and_val_are_not(
    cached: str, request: pytest.FixtureRequest
) -> None:
    encoded = Encoded(request.getfixturevalue(cached), ())
    shown = Shown(encoded)
    train = encoded.train
    for index in range(len(train)):
        for view in range(train.views):
            latents = stored(encoded, train, index, view)
            assert shown.share_of(latents + 1e-4 * torch.randn_like(latents)) == 1
    assert sum(shown.share_of(stored(encoded, encoded.val, index, 0)) for index in range(len(encoded.val))) == 0
    assert shown.share_of(torch.randn(20, *encoded.shape)) == 0


class Copier(nn.Module):
    """A flow network that draws the same train picture whatever it is asked for."""

    config: ClassVar[dict[str, Any]] = {}

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = nn.Parameter(x0)
        self.device = x0.device

    def forward(self, latents: Tensor, told: Tensor, **_: Any) -> tuple[Tensor]:
        """Noised latents (N, C, h, w), told (N,) or () -> (N, C, h, w)."""
        return ((latents - self.x0) * 1000 / told.reshape(-1, 1, 1, 1),)


@torch.no_grad()
def test_a_network_that_draws_its_pictures_is_found_out_at_its_validation(latents: Path, tmp_path: Path) -> None:
    task = TrainUnet(config(TrainUnetConfig, latents, tmp_path / "r"))
    known = task.validate(tmp_path)["copies"]
    assert known in [number / ASKED for number in range(ASKED + 1)]
    task.unet = Copier(stored(task.encoded, task.encoded.train, 3, 1))
    assert task.validate(tmp_path)["copies"] == 1
    task.unet = Copier(torch.randn(1, *task.encoded.shape))
    assert task.validate(tmp_path)["copies"] == 0
