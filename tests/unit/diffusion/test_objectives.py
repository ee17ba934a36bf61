"""Noise levels and targets: against closed forms and against Diffusers' own arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from limner.diffusion import schedulers
from limner.diffusion.objectives import (
    TIMESTEPS,
    Objective,
    add_noise,
    draw_noise,
    draw_t,
    level,
    mean_error,
    min_snr,
    step_of,
    target,
    timestep,
)

VARIANCE_PRESERVING: list[Objective] = ["eps", "v"]
EVERY_STEP = torch.arange(TIMESTEPS)
MIDDLES = (EVERY_STEP + 0.5) / TIMESTEPS  # a t that falls on each step
BETAS = schedulers.new("eps").betas


def pair(count: int) -> tuple[Tensor, Tensor]:
    """Latents and noise (count, 4, 2, 2)."""
    rng = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, count, 4, 2, 2, generator=rng)
    return x0, noise


def ddpm(**settings: Any) -> DDPMScheduler:
    """Diffusers' scheduler with Stable Diffusion's betas."""
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **settings)


# ---- flow


def test_flow_lies_on_the_line_from_data_to_noise() -> None:
    x0, noise = pair(3)
    t = torch.tensor([0.25, 0.5, 1.0])
    alpha, sigma = level("flow", t)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    noised = add_noise(x0, noise, alpha, sigma)
    assert_close(noised[0], 0.75 * x0[0] + 0.25 * noise[0])
    assert torch.equal(noised[2], noise[2])
    assert torch.equal(target("flow", x0, noise, alpha, sigma), noise - x0)


@given(st.floats(0, 1, width=32, exclude_min=True))
def test_a_step_along_the_flow_recovers_data_and_noise(t: float) -> None:
    x0, noise = pair(1)
    alpha, sigma = level("flow", torch.tensor([t]))
    noised, velocity = add_noise(x0, noise, alpha, sigma), target("flow", x0, noise, alpha, sigma)
    assert_close(noised - sigma * velocity, x0, rtol=0, atol=1e-5)
    assert_close(noised + alpha * velocity, noise, rtol=0, atol=1e-5)


# ---- eps and v


@pytest.mark.parametrize("objective", VARIANCE_PRESERVING)
def test_noise_and_targets_are_those_of_diffusers_at_every_step(objective: Objective) -> None:
    x0, noise = pair(TIMESTEPS)
    oracle = ddpm()
    alpha, sigma = level(objective, MIDDLES, BETAS)
    assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha))
    assert_close(add_noise(x0, noise, alpha, sigma), oracle.add_noise(x0, noise, EVERY_STEP), rtol=1e-4, atol=1e-4)
    wanted = noise if objective == "eps" else oracle.get_velocity(x0, noise, EVERY_STEP)
    assert_close(target(objective, x0, noise, alpha, sigma), wanted, rtol=1e-4, atol=1e-4)


@given(st.floats(0, 1, width=32, exclude_min=True))
def test_every_t_falls_on_a_step(t: float) -> None:
    step = int(step_of(torch.tensor([t])))
    assert 0 <= step < TIMESTEPS
    assert step / TIMESTEPS <= t * (1 + 1e-6)
    assert t * (1 - 1e-6) <= (step + 1) / TIMESTEPS


def test_each_step_has_an_equal_share_of_t() -> None:
    assert torch.equal(step_of(MIDDLES), EVERY_STEP)
    assert step_of(torch.tensor([1e-12, 1.0])).tolist() == [0, TIMESTEPS - 1]


def test_eps_and_v_need_betas() -> None:
    with pytest.raises(AssertionError, match="betas"):
        level("eps", torch.tensor([0.5]))


# ---- what the network is told


def test_the_network_is_told_its_noise_level() -> None:
    t = torch.tensor([0.0005, 0.5, 1.0])
    assert_close(timestep("flow", t), torch.tensor([0.5, 500.0, 1000.0]))
    assert timestep("eps", t).tolist() == timestep("v", t).tolist() == [0, 499, 999]


# ---- levels drawn in training


@given(st.sampled_from(["logit-normal", "uniform", "cosine"]), st.integers(0, 2**63))
def test_a_level_is_above_0_and_at_most_1(levels: Any, seed: int) -> None:
    t = np.float32(draw_t(levels, np.random.default_rng(seed)))  # as the training's examples hold it
    assert 0 < t <= 1


def test_logit_normal_levels_have_a_normal_logit() -> None:
    rng = np.random.default_rng(0)
    t = np.array([draw_t("logit-normal", rng) for _ in range(20_000)])
    assert stats.kstest(np.log(t / (1 - t)), "norm").pvalue > 0.01
    assert abs(t.mean() - 0.5) < 0.005
    quantiles = 1 / (1 + np.exp(-stats.norm.ppf([0.05, 0.25, 0.75, 0.95])))
    assert np.abs(np.quantile(t, [0.05, 0.25, 0.75, 0.95]) - quantiles).max() < 0.01


def test_uniform_levels_are_uniform() -> None:
    rng = np.random.default_rng(0)
    assert stats.kstest([draw_t("uniform", rng) for _ in range(20_000)], "uniform").pvalue > 0.01


def test_cosine_levels_have_the_signal_to_noise_ratios_of_the_cosine_schedule() -> None:
    """Of a uniform u, that is cot^2(pi u / 2): Nichol and Dhariwal 2102.09672, equation 17, without its offset."""
    rng = np.random.default_rng(0)
    t = np.array([draw_t("cosine", rng) for _ in range(20_000)])
    u = 2 / np.pi * np.arctan2(t, 1 - t)
    assert stats.kstest(u, "uniform").pvalue > 0.01
    counts, edges = np.histogram(t, bins=10, range=(0, 1), density=True)
    middles = (edges[1:] + edges[:-1]) / 2
    assert np.abs(counts - 2 / (np.pi * (1 - 2 * middles + 2 * middles**2))).max() < 0.06


class Extreme(np.random.Generator):
    """Draws the same uniform number over and over."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self, *_: Any) -> Any:
        """That number."""
        return self.value


@pytest.mark.parametrize("levels", ["uniform", "cosine"])
def test_the_ends_of_the_range_of_levels(levels: Any) -> None:
    assert draw_t(levels, Extreme(0.0)) == 1
    assert 0 < np.float32(draw_t(levels, Extreme(1 - 2**-53))) < 1e-15


# ---- noise


def test_noise_is_the_generators_own() -> None:
    noise = draw_noise((4, 3, 5), np.random.default_rng(7))
    assert torch.equal(noise, torch.from_numpy(np.random.default_rng(7).standard_normal((4, 3, 5), np.float32)))


def test_an_offset_adds_to_the_variance_that_channels_share() -> None:
    """What is added to a channel is one number, of the deviation that was asked for, beside the same noise."""
    plain, offset = (draw_noise((500, 4, 3, 5), np.random.default_rng(7), strength) for strength in (0.0, 0.3))
    added = offset - plain  # (500, 4, 3, 5)
    assert_close(added, added[..., :1, :1].expand_as(added), rtol=0, atol=1e-6)
    constants = added[..., 0, 0].flatten().double().numpy() / 0.3  # (2000,)
    assert stats.kstest(constants, "norm").pvalue > 0.01
    assert abs(np.corrcoef(constants.reshape(500, 4).T)[0, 1]) < 0.15, "channels differ"
    assert_close(offset.var().item(), 1 + 0.3**2, rtol=0.02, atol=0)


# ---- what counts

LEVELS = st.floats(0.01, 0.99)


@given(LEVELS, st.floats(0.1, 20))
def test_min_snr_counts_the_same_error_in_x0_the_same_whatever_is_predicted(t: float, gamma: float) -> None:
    """A guess of x0 is a guess of every target, whose error the weight turns into min(SNR, gamma) that of x0."""
    x0, noise = pair(1)
    guess = x0.double() + 0.3 * noise.flip(1).double()
    for objective, (alpha, sigma) in (
        ("eps", (np.cos(t), np.sin(t))),
        ("v", (np.cos(t), np.sin(t))),
        ("flow", (1 - t, t)),
    ):
        a, s = (torch.tensor(value, dtype=torch.float64).reshape(1, 1, 1, 1) for value in (alpha, sigma))
        noised = add_noise(x0.double(), noise.double(), a, s)
        wanted = target(objective, x0.double(), noise.double(), a, s)
        given_ = target(objective, guess, (noised - a * guess) / s, a, s)
        counted = min_snr(objective, a, s, gamma) * (given_ - wanted).square().mean()
        assert_close(
            counted.item(), min((alpha / sigma) ** 2, gamma) * (guess - x0).square().mean().item(), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("objective", VARIANCE_PRESERVING)
def test_min_snr_is_as_the_paper_has_it_at_every_step(objective: Objective) -> None:
    alpha, sigma = level(objective, MIDDLES.double(), BETAS)
    snr = (alpha / sigma).square().flatten()
    wanted = snr.clamp(max=5) / (snr if objective == "eps" else snr + 1)
    weights = min_snr(objective, alpha, sigma, 5)
    assert weights.shape == (TIMESTEPS,)
    assert_close(weights, wanted)
    assert weights[0] < 0.1 * weights.max(), "low levels count less"


def test_without_noise_nothing_counts() -> None:
    one, zero = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    assert all(min_snr(objective, one, zero, 5).tolist() == [0, 0] for objective in ("flow", "eps", "v"))


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 5))
def test_the_mean_error_is_over_what_is_let_in(seed: int, channels: int, side: int) -> None:
    rng = np.random.default_rng(seed)
    errors, mask = rng.random((3, channels, side, side)), rng.random((3, 1, side, side))
    mask[0] = 0
    means = mean_error(torch.from_numpy(errors), torch.from_numpy(mask))
    assert means[0] == 0, "nothing was let in"
    for k in (1, 2):
        assert means[k].item() == pytest.approx(
            np.average(errors[k], weights=np.broadcast_to(mask[k], errors[k].shape))
        )


def test_a_mask_that_lets_all_in_is_no_mask() -> None:
    errors = pair(3)[0].square()
    assert_close(mean_error(errors, torch.full((3, 1, 2, 2), 0.25)), mean_error(errors))
    assert_close(mean_error(errors).mean(), errors.mean())


def test_the_gradient_of_what_is_masked_out_is_nothing() -> None:
    errors = pair(2)[0].requires_grad_()
    mask = torch.tensor([[[[1.0, 0.0], [0.5, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    mean_error(errors.square(), mask).sum().backward()
    assert errors.grad is not None
    assert errors.grad.isfinite().all()
    assert torch.equal(errors.grad != 0, (mask > 0).expand_as(errors))
