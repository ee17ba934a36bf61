"""A new U-Net has the sizes that were set."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from limner.config import TrainUnetConfig
from limner.diffusion.guidance import embedding
from limner.models import unet
from limner.settings import resolve
from tiny import WIDTH, tiny_unet


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


def test_a_student_of_a_unet_whose_file_leaves_much_to_defaults_reads_the_guidance_scale() -> None:
    short = {name: value for name, value in tiny_unet().config.items() if name != "time_cond_proj_dim"}
    teacher = UNet2DConditionModel.from_config({key: value for key, value in short.items() if key[0] != "_"})
    student = unet.with_guidance(teacher)
    assert student.config["time_cond_proj_dim"] == unet.GUIDANCE_WIDTH
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 3, WIDTH)
    scale = embedding(torch.tensor([4.0]), unet.GUIDANCE_WIDTH)
    with torch.no_grad():
        told = student(latents, 500, states, timestep_cond=scale).sample
        assert torch.equal(told, teacher(latents, 500, states).sample), "it has not learned to yet"
