"""Classifier-free guidance in two passes, and what a U-Net reads that has it folded into one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def guided(
    unet: Any, noised: Tensor, timesteps: Tensor, states: Tensor, guidance: float | Tensor, rescale: float = 0.0
) -> Tensor:
    """What a U-Net answers without the caption, and from there towards it (Ho and Salimans 2207.12598, equation 6).

    noised (N, C, h, w), timesteps () or (N,), states (2N, L, D): those without the captions first; guidance a scale, or
    one for each image (N, 1, 1, 1) -> (N, C, h, w). Both passes share a batch. `rescale`, from 0 to 1, is the share of
    the answer that is brought back to the deviation it has with the caption (Lin et al. 2305.08891, section 3.4).
    `staged.Passes` takes what both passes share once.
    """
    if not getattr(unet, "shares_latents", False):
        noised = torch.cat([noised, noised])
        timesteps = torch.cat([timesteps, timesteps]) if timesteps.ndim else timesteps
    predicted = unet(noised, timesteps, encoder_hidden_states=states, return_dict=False)[0]
    without, towards = predicted.chunk(2)  # (N, C, h, w) each
    answer: Tensor = without + guidance * (towards - without)
    if rescale:
        over = tuple(range(1, answer.ndim))
        deviations = towards.std(over, keepdim=True) / answer.std(over, keepdim=True)  # (N, 1, 1, 1)
        answer = rescale * (answer * deviations) + (1 - rescale) * answer
    return answer


def is_folded(unet: Any) -> bool:
    """Whether the U-Net takes the guidance scale as an input, so that guided and unguided steps are one pass each."""
    return unet.config.get("time_cond_proj_dim") is not None


def embedding(guidance: Tensor, width: int) -> Tensor:
    """What such a U-Net reads in place of a second pass, of scales (N,) -> (N, width).

    Meng et al. 2210.03142, section 3.1, as Diffusers computes it.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=guidance.device) * -(math.log(10_000.0) / (half - 1)))  # (half,)
    angles = 1000.0 * (guidance[:, None] - 1) * frequencies  # (N, half)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (N, 2 half)
    return torch.nn.functional.pad(waves, (0, width - 2 * half))
