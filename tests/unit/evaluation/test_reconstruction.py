"""What a VAE gives back, against scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from limner.evaluation.reconstruction import feature_distance, psnr, reconstructed, ssim
from tiny import tiny_taesd, tiny_vae


def pair(height: int, width: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two pictures and what noise made of them, (2, 3, H, W) in [-1, 1] each."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 4, 4, generator=generator) * 2 - 1
    target = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (target + noise * torch.randn(target.shape, generator=generator)).clamp(-1, 1), target


@given(st.integers(11, 24), st.integers(11, 24), st.sampled_from([0.01, 0.1, 0.5]), st.integers(0, 99))
@settings(max_examples=15)
def test_psnr_and_ssim_are_those_of_scikit_image(height: int, width: int, noise: float, seed: int) -> None:
    pixels, target = pair(height, width, noise, seed)
    for number, (ours, wanted) in enumerate(zip(pixels.double().numpy(), target.double().numpy())):
        theirs = structural_similarity(
            ours, wanted, channel_axis=0, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(pixels, target)[number].item() == pytest.approx(theirs, abs=1e-9)
        decibels = peak_signal_noise_ratio(wanted, ours, data_range=2)
        assert psnr(pixels, target)[number].item() == pytest.approx(decibels, abs=1e-6)


def test_equal_pictures_are_known_and_noise_is_worse() -> None:
    _, target = pair(16, 16, 0, 0)
    assert ssim(target, target).tolist() == pytest.approx([1, 1])
    assert psnr(target, target).tolist() == [np.inf, np.inf]
    for figure in (psnr, ssim):
        found = [figure(*pair(16, 16, noise, 0)).mean().item() for noise in (0.02, 0.1, 0.3, 0.6)]
        assert found == sorted(found, reverse=True)


def test_features_that_point_the_same_way_are_not_apart() -> None:
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert feature_distance(one, other).tolist() == pytest.approx([0, 1, 2])


@pytest.mark.parametrize("vae", [tiny_vae(), tiny_taesd()], ids=["kl", "tiny"])
def test_pictures_go_through_a_vae_and_back(vae: torch.nn.Module) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    back = reconstructed(vae, pixels)
    assert back.shape == pixels.shape
    assert back.abs().max() <= 1
    assert torch.equal(reconstructed(vae, pixels), back), "by the mean, not by chance"
