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
from limner.diffusion.objectives import TIMESTEPS, Objective, add_noise, draw_t, level, step_of, target, timestep

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


@given(st.sampled_from(["logit-normal", "uniform"]), st.integers(0, 2**63))
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
