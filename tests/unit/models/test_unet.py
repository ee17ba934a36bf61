"""A new U-Net has the sizes that were set."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention

from limner.config import TrainUnetConfig
from limner.models import unet
from limner.settings import resolve


def config(**settings: object) -> TrainUnetConfig:
    """The configuration of a U-Net."""
    return resolve(TrainUnetConfig, {"data": "d", "out": "o", **settings})


@pytest.mark.parametrize(
    ("channels", "attention", "head_width", "layers"),
    [((8, 16), (False, True), 8, 1), ((16, 16, 32), (True, False, True), 4, 2)],
)
@torch.no_grad()
def test_it_has_the_sizes_that_were_set(
    channels: tuple[int, ...], attention: tuple[bool, ...], head_width: int, layers: int
) -> None:
    settings = config(channels=channels, attention=attention, head_width=head_width, layers=layers)
    network = unet.new(settings, side=8, latent_channels=6, state_width=20).eval()
    assert network.config["sample_size"] == 8
    latents, states = torch.randn(2, 6, 8, 8), torch.randn(2, 7, 20)
    answer = network(latents, torch.tensor([1.5, 900.0]), encoder_hidden_states=states).sample
    assert answer.shape == latents.shape
    blocks = [*network.down_blocks, *reversed(network.up_blocks)]
    for block, attends, width in zip(blocks, [*attention, *attention], [*channels, *channels]):
        layers_of = [module for module in block.modules() if isinstance(module, Attention)]
        assert bool(layers_of) == attends
        for layer in layers_of:
            assert layer.heads * head_width == width, "heads are as wide as was set"
    assert len(network.down_blocks[0].resnets) == layers


@torch.no_grad()
def test_it_reads_caption_and_noise_level() -> None:
    torch.manual_seed(0)
    settings = config(channels=(8, 16), attention=(False, True), head_width=8)
    network = unet.new(settings, side=8, latent_channels=4, state_width=20).eval()
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(2, 1, 7, 20)

    def answer(t: float, which: int) -> torch.Tensor:
        told: torch.Tensor = network(latents, t, encoder_hidden_states=states[which]).sample
        return told

    assert not torch.equal(answer(10, 0), answer(10, 1))
    assert not torch.equal(answer(10, 0), answer(10.5, 0)), "levels between whole timesteps are told apart"
