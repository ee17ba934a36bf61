"""Guidance in two passes, and the scale as an input, as Diffusers computes them."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch.testing import assert_close

from limner.diffusion.guidance import embedding, guided, is_folded
from tiny import WIDTH, tiny_unet


@pytest.mark.parametrize("width", [16, 17, 256])
def test_the_scale_as_an_input_is_that_of_diffusers(width: int) -> None:
    scales = torch.tensor([1.0, 1.5, 8.0])
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, width)
    assert_close(embedding(scales, width), theirs, rtol=0, atol=1e-4)


@torch.no_grad()
def test_each_image_is_guided_by_its_own_scale() -> None:
    unet, (noised, _) = tiny_unet(), torch.randn(2, 3, 4, 8, 8)
    empty, states = torch.randn(2, 3, 77, WIDTH)
    timesteps, scales = torch.tensor([10, 500, 990]), torch.tensor([1.0, 2.0, 7.5])
    found = guided(unet, noised, timesteps, torch.cat([empty, states]), scales[:, None, None, None])
    for k in range(3):
        without, towards = (
            unet(noised[k : k + 1], timesteps[k], encoder_hidden_states=x[k : k + 1]).sample for x in (empty, states)
        )
        assert_close(found[k : k + 1], without + scales[k] * (towards - without), rtol=1e-4, atol=1e-5)
    alone = guided(unet, noised[:1], torch.tensor(10), torch.cat([empty[:1], states[:1]]), 1.0)
    assert_close(alone, found[:1], rtol=1e-4, atol=1e-5)


def test_a_unet_says_whether_guidance_is_folded_in() -> None:
    assert is_folded(tiny_unet(time_cond_proj_dim=8))
    assert not is_folded(tiny_unet())
