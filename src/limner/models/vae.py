"""Pixels to moments to latents and back; the one file that knows a VAE's scale and shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Moments of pixels in [-1, 1].

    pixels (N, 3, H, W) -> (N, 2C, h, w): the mean of the encoder's Gaussian, then its log-variance.
    """
    moments: Tensor = vae.encode(pixels).latent_dist.parameters
    return moments


def sample(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw from the Gaussian that moments describe, in the VAE's own scale (Kingma and Welling 2013, section 2.4).

    moments (N, 2C, h, w), noise (N, C, h, w) -> (N, C, h, w).
    """
    mean, logvar = moments.chunk(2, dim=1)  # (N, C, h, w) each
    return mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise


def to_latents(vae_config: Any, drawn: Tensor) -> Tensor:
    """Scale what `sample` drew to the unit variance that the U-Net sees. (N, C, h, w) -> (N, C, h, w)."""
    scale, shift = _affine(vae_config)
    return (drawn - shift) * scale


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels of latents, not clamped. (N, C, h, w) -> (N, 3, H, W), about [-1, 1]."""
    scale, shift = _affine(vae.config)
    pixels: Tensor = vae.decode(latents / scale + shift, return_dict=False)[0]
    return pixels


def _affine(vae_config: Any) -> tuple[float, float]:
    return float(vae_config["scaling_factor"]), float(vae_config.get("shift_factor") or 0.0)


@torch.no_grad()
def standardise(vae: Any, mean: Tensor, std: Tensor) -> None:
    """Fold the latents' own mean and deviation into the 1x1 convolutions beside them, so that scale is 1, shift 0.

    mean, std (C,) of `sample`d latents. Diffusers' StableDiffusionPipeline knows one scale for all channels and no
    shift; the quantising convolutions are affine, so whitening each channel there is exact.
    """
    inverse = torch.cat([1 / std, torch.ones_like(std)])  # (2C,)
    vae.quant_conv.weight.mul_(inverse[:, None, None, None])
    vae.quant_conv.bias.mul_(inverse)
    vae.quant_conv.bias.sub_(torch.cat([mean / std, 2 * std.log()]))  # log-variance: -2 log std
    vae.post_quant_conv.bias.add_(vae.post_quant_conv.weight[:, :, 0, 0] @ mean)
    vae.post_quant_conv.weight.mul_(std[None, :, None, None])
    vae.register_to_config(scaling_factor=1.0)
