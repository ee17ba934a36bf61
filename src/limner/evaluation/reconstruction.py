"""How much of a picture a VAE gives back."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from limner.models import vae as vaes

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian window, in pixels
K1, K2 = 0.01, 0.03  # what keeps SSIM's fractions from 0 / 0, as shares of the range of pixels
RANGE = 2.0  # of pixels in [-1, 1]


@torch.no_grad()
def reconstructed(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels through a VAE and back, by the mean of its moments. (N, 3, H, W) in [-1, 1] -> the same."""
    mean = vaes.encode(vae, pixels).chunk(2, dim=1)[0]  # (N, C, h, w)
    return vaes.decode(vae, vaes.to_latents(vae.config, mean)).clamp(-1, 1)


def psnr(pixels: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(range^2 / mean squared error). (N, 3, H, W) twice -> (N,)."""
    error = (pixels - target).double().square().mean(dim=(1, 2, 3))  # (N,)
    return 10 * torch.log10(RANGE**2 / error)


def ssim(pixels: Tensor, target: Tensor) -> Tensor:
    """Structural similarity, 1 for equal pictures; Wang et al., Image Quality Assessment (2004), equation 13.

    Mean over the three channels and over all places where the 11x11 Gaussian window fits. (N, 3, H, W) twice, of at
    least 11x11 pixels -> (N,).
    """
    assert min(pixels.shape[2:]) >= WINDOW
    x, y = pixels.double().flatten(0, 1)[:, None], target.double().flatten(0, 1)[:, None]  # (3N, 1, H, W)
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)  # (3N, 1, h, w)
    return likeness.mean(dim=(1, 2, 3)).unflatten(0, (-1, pixels.shape[1])).mean(dim=1)


def _blurred(x: Tensor) -> Tensor:
    """(N, 1, H, W) -> (N, 1, H - 10, W - 10)."""
    height, width = x.shape[2:]
    return _band(height).to(x) @ x @ _band(width).to(x).T


@functools.cache
def _band(side: int) -> Tensor:
    """The window along a line of `side` pixels, which slides by multiplication (side - 10, side)."""
    reach = WINDOW // 2
    weights = torch.tensor([math.exp(-(i**2) / (2 * SIGMA**2)) for i in range(-reach, reach + 1)], dtype=torch.double)
    places = torch.arange(side - WINDOW + 1)[:, None] + torch.arange(WINDOW)  # (side - 10, 11)
    return torch.zeros(len(places), side, dtype=torch.double).scatter(
        1, places, (weights / weights.sum()).expand(len(places), -1)
    )


def feature_distance(features: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine of an extractor's features of pictures and of what they should be. (N, D) twice -> (N,)."""
    return 1 - cosine_similarity(features.double(), target.double(), dim=1)
