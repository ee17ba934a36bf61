"""Pixels, moments and latents: the VAE's scale is Diffusers', and standardising one changes no pixel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor
from torch.testing import assert_close

from limner.errors import ConfigError
from limner.models import vae as vaes
from tiny import tiny_taesd, tiny_vae

STABLE_DIFFUSION = {"block_out_channels": [128, 256, 512, 512], "scaling_factor": 0.18215}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Unit Gaussian noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(count: int = 3, side: int = 16) -> Tensor:
    """Pixels in [-1, 1]."""
    return random(count, 3, side, side).tanh()


# ---- a new one


@pytest.mark.parametrize(("channels", "factor"), [([8], 1), ([8, 16], 2), ([8, 16, 24, 8], 8)])
@torch.no_grad()
def test_a_new_one_halves_the_side_at_each_resolution_but_the_last(channels: list[int], factor: int) -> None:
    vae = vaes.new(channels, 1, 6).eval()
    assert vaes.factor(vae.config) == factor
    moments = vaes.encode(vae, pixels())
    assert moments.shape == (3, 12, 16 // factor, 16 // factor)
    assert vaes.decode(vae, vaes.sample(moments, torch.zeros(3, 6, 16 // factor, 16 // factor))).shape == (3, 3, 16, 16)


def test_channels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of 8, not 12"):
        vaes.new((16, 12), 1, 4)


# ---- factor


@torch.no_grad()
@pytest.mark.parametrize("vae", [tiny_vae(), tiny_taesd()], ids=["AutoencoderKL", "AutoencoderTiny"])
def test_the_factor_is_that_of_the_shapes(vae: Any) -> None:
    moments = vaes.encode(vae, pixels())
    assert vaes.factor(vae.config) == 16 // moments.shape[-1] == 2
    assert moments.shape[1] == 2 * vae.config["latent_channels"]


def test_the_factor_of_known_models() -> None:
    assert vaes.factor(STABLE_DIFFUSION) == 8
    assert vaes.factor(AutoencoderTiny().config) == 8


# ---- encode and sample, decode


@torch.no_grad()
def test_samples_are_those_of_diffusers() -> None:
    vae, x = tiny_vae(), pixels()
    distribution = vae.encode(x).latent_dist
    moments, noise = vaes.encode(vae, x), random(3, 4, 8, 8, seed=1)
    assert torch.equal(vaes.sample(moments, noise), distribution.mean + distribution.std * noise)
    assert torch.equal(vaes.sample(moments, torch.zeros_like(noise)), distribution.mode())


def test_log_variances_are_cut_as_diffusers_cuts_them() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = 60 * random(2, 8, 4, 4)
    distribution = DiagonalGaussianDistribution(moments)
    noise = random(2, 4, 4, 4, seed=1)
    assert torch.equal(vaes.sample(moments, noise), distribution.mean + distribution.std * noise)


@torch.no_grad()
def test_an_autoencoder_without_variance_gives_its_latents() -> None:
    vae, x = tiny_taesd(), pixels()
    drawn = vaes.sample(vaes.encode(vae, x), random(3, 4, 8, 8, seed=1))
    assert_close(drawn, vae.encode(x).latents, rtol=0, atol=5e-6)
    again = vaes.decode(vae, vaes.to_latents(vae.config, drawn))
    assert_close(again, vae.decode(vae.encode(x).latents).sample, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("scale", "shift"), [(0.18215, None), (0.3611, 0.1159)])
def test_scale_and_shift_are_applied_as_diffusers_pipelines_do(scale: float, shift: float | None) -> None:
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    drawn = random(2, 4, 8, 8)
    latents = vaes.to_latents(vae.config, drawn)
    assert_close(latents, (drawn - (shift or 0)) * scale)
    assert_close(vaes.decode(vae, latents), vae.decode(drawn).sample, rtol=0, atol=1e-5)


# ---- standardise


def uneven(latent_channels: int = 4) -> AutoencoderKL:
    """A VAE whose latents have a mean and deviation of their own in each channel."""
    torch.manual_seed(0)
    vae = vaes.new((8, 16), 1, latent_channels).eval()
    with torch.no_grad():
        vae.quant_conv.weight.normal_()
        vae.quant_conv.bias.normal_(std=3)
        vae.quant_conv.bias[latent_channels:] -= 3
    return vae


@torch.no_grad()
def statistics(vae: Any, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of sampled latents, a channel -> (C,) each."""
    latents = vaes.to_latents(vae.config, vaes.sample(vaes.encode(vae, x), noise))
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))


@torch.no_grad()
def test_a_scale_that_an_early_file_leaves_out_is_that_of_diffusers() -> None:
    for cls in (AutoencoderKL, AutoencoderTiny):
        told = dict(cls().config)
        short = {key: value for key, value in told.items() if key != "scaling_factor"}
        drawn = torch.ones(1, 4, 1, 1)
        assert torch.equal(vaes.to_latents(short, drawn), vaes.to_latents(told, drawn))


def test_standardised_latents_have_zero_mean_and_unit_deviation_and_the_same_pixels() -> None:
    vae, x, noise = uneven(), pixels(), random(3, 4, 8, 8, seed=1)
    before = vaes.decode(vae, vaes.to_latents(vae.config, vaes.sample(vaes.encode(vae, x), noise)))
    mean, std = statistics(vae, x, noise)
    assert mean.abs().max() > 0.5
    assert (std - 1).abs().max() > 0.5
    vaes.standardise(vae, mean, std)
    now = statistics(vae, x, noise)
    assert_close(now[0], torch.zeros(4), rtol=0, atol=1e-5)
    assert_close(now[1], torch.ones(4), rtol=0, atol=1e-5)
    after = vaes.decode(vae, vaes.to_latents(vae.config, vaes.sample(vaes.encode(vae, x), noise)))
    assert_close(after, before, rtol=0, atol=1e-5)
    assert vae.config["scaling_factor"] == 1.0
    assert not vae.config.get("shift_factor")


@torch.no_grad()
def test_a_standardised_vae_keeps_its_scale_on_disk(tmp_path: Any) -> None:
    vae, x, noise = uneven(), pixels(), random(3, 4, 8, 8, seed=1)
    vaes.standardise(vae, *statistics(vae, x, noise))
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert loaded.config["scaling_factor"] == 1.0
    assert torch.equal(vaes.encode(loaded, x), vaes.encode(vae, x))
