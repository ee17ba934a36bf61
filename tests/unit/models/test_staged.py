"""A U-Net taken apart answers as Diffusers' own, and what a prompt decides is computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from limner.diffusion.guidance import guided
from limner.models.staged import Passes, Staged, fits
from tiny import WIDTH, tiny_unet

VARIANTS: dict[str, dict[str, Any]] = {
    "as Stable Diffusion 1": {},
    "as Stable Diffusion 2": {"use_linear_projection": True, "upcast_attention": True},
    "attention everywhere": {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "attention_head_dim": (2, 4)},
    "two layers": {"layers_per_block": 2, "transformer_layers_per_block": 2},
    "guidance as an input": {"time_cond_proj_dim": 16},
}


def passes(unet: Any, reuse: int = 1) -> Passes:
    """The U-Net as the denoising loop calls it."""
    return Passes(unet.config, Staged(unet), reuse)


def given(pictures: int, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor]:
    """Latents, and token states of two passes."""
    torch.manual_seed(1)
    return torch.randn(pictures, 4, *size), torch.randn(2 * pictures, 7, WIDTH)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("pictures", [1, 3])
@torch.no_grad()
def test_it_answers_as_diffusers_does(settings: dict[str, Any], pictures: int) -> None:
    unet = tiny_unet(**settings)
    assert fits(unet.config)
    latents, states = given(pictures)
    condition = torch.randn(1, 16) if "time_cond_proj_dim" in settings else None
    named = {"timestep_cond": condition, "return_dict": False}
    for timestep in (torch.tensor(600), torch.arange(1, pictures + 1)):
        wanted = unet(latents, timestep, states[:pictures], **named)[0]
        assert_close(passes(unet)(latents, timestep, states[:pictures], **named)[0], wanted, atol=1e-5, rtol=0)
        twice = timestep.repeat(2) if timestep.ndim else timestep
        wanted = unet(latents.repeat(2, 1, 1, 1), twice, states, **named)[0]
        assert wanted.std() > 0.1
        assert_close(passes(unet)(latents, timestep, states, **named)[0], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(7, 5), (12, 8)])
@torch.no_grad()
def test_sizes_that_do_not_halve_are_as_diffusers_has_them(size: tuple[int, int]) -> None:
    unet = tiny_unet()
    latents, states = given(2, size)
    wanted = guided(unet, latents, torch.tensor(600), states, 5.0, 0.5)
    assert_close(guided(passes(unet), latents, torch.tensor(600), states, 5.0, 0.5), wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_keys_and_values_are_computed_once_a_prompt() -> None:
    unet = tiny_unet()
    seen: list[int] = []
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_k"):
            module.register_forward_hook(lambda *_: seen.append(1))
    quick, (latents, states) = passes(unet), given(1)
    for timestep in (900, 600, 300):
        quick(latents, torch.tensor(timestep), states)
    once = len(seen)
    assert once == len(Staged(unet).attentions)
    other = quick(latents, torch.tensor(300), states + 1)[0]
    assert len(seen) == 2 * once
    assert not torch.equal(other, quick(latents, torch.tensor(300), states)[0])


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_what_is_reused_is_what_was_computed(settings: dict[str, Any]) -> None:
    unet, (latents, states) = tiny_unet(**settings), given(2)
    inner: list[int] = []
    unet.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: inner.append(1))
    condition = torch.randn(1, 16) if "time_cond_proj_dim" in settings else None
    whole, reusing = passes(unet), passes(unet, reuse=2)
    for number, timestep in enumerate((900, 600, 300, 0)):
        drawn = latents + number
        before = len(inner)
        answer = reusing(drawn, torch.tensor(timestep), states, condition)[0]
        assert len(inner) - before == (number + 1) % 2, "at each other step"
        wanted = whole(drawn, torch.tensor(timestep), states, condition)[0]
        assert torch.equal(answer, wanted) == (number % 2 == 0)
    # At the very same latents and timestep nothing has changed that could be missed
    reusing = passes(unet, reuse=3)
    answers = [reusing(latents, torch.tensor(500), states, condition)[0] for _ in range(3)]
    assert_close(answers[1:], answers[:1] * 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_class_embeds": 3},
        {"resnet_time_scale_shift": "scale_shift"},
        {"act_fn": "gelu"},
        {"mid_block_type": "UNetMidBlock2D"},
        {"up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D")},
        {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"},
        {"only_cross_attention": True},
    ],
    ids=str,
)
def test_what_it_does_not_know_it_leaves_to_diffusers(settings: dict[str, Any]) -> None:
    assert not fits(tiny_unet(**settings).config)
