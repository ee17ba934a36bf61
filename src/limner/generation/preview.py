"""What latents look like without the VAE's decoder: a linear map from latents to colours, fitted to the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from limner.models import vae as vaes

EXAMPLES, SIDE, COARSE = 8, 16, (1, 8, 16)


class Preview:
    """The linear map of one VAE: a colour a latent, from its channels."""

    @torch.no_grad()
    def __init__(self, vae: Any) -> None:
        """Fit to what the decoder makes of random latents by least squares.

        Each is a constant, blotches and grains in one, which kept colours best (docs/experiments.md, 2026-11-25).
        """
        parameter = next(vae.parameters())
        generator = torch.Generator().manual_seed(0)
        channels = vae.config["latent_channels"]
        coarse = [torch.randn(EXAMPLES, channels, side, side, generator=generator) for side in COARSE]
        smooth = sum(interpolate(noise, (SIDE, SIDE), mode="bicubic") for noise in coarse)
        latents = smooth / len(COARSE) ** 0.5  # (N, C, h, w), of about unit variance
        pixels = vaes.decode(vae, latents.to(parameter)).float().clamp(-1, 1)  # (N, 3, H, W)
        seen = _rows(latents)  # (N h w, C + 1)
        shown = adaptive_avg_pool2d(pixels, (SIDE, SIDE)).permute(0, 2, 3, 1).flatten(0, 2).cpu()  # (N h w, 3)
        self.map = torch.linalg.lstsq(seen, shown).solution  # (C + 1, 3)

    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels, one a latent, of latents. (N, C, h, w) -> (N, 3, h, w), about [-1, 1]."""
        count, _, height, width = latents.shape
        return (_rows(latents) @ self.map).reshape(count, height, width, 3).permute(0, 3, 1, 2)


def _rows(latents: Tensor) -> Tensor:
    """The channels of each latent, and a 1 for the constant. (N, C, h, w) -> (N h w, C + 1), on CPU."""
    rows = latents.float().cpu().permute(0, 2, 3, 1).flatten(0, 2)
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
