"""Schedulers: sampling undoes what training noised, at the levels that the network was told in training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from limner.diffusion import schedulers
from limner.diffusion.objectives import TIMESTEPS, Objective, level, timestep
from limner.errors import ModelError
from limner.generation.engine import denoise, initial_noise
from limner.models import loading

OBJECTIVES: list[Objective] = ["flow", "eps", "v"]
STEPS = (1, 4, 20, 50)
MEAN, STD = 0.7, 0.4  # of the data that `Oracle` knows


def noise_levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """alpha and sigma of each step of a scheduler, from its sigmas -> (S,) each."""
    sigma = scheduler.sigmas[:-1]
    if scheduler.config.use_flow_sigmas:
        return 1 - sigma, sigma
    return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sampling_tells_the_network_what_training_told_it_at_that_level(objective: Objective, steps: int) -> None:
    scheduler = schedulers.new(objective)
    scheduler.set_timesteps(steps)
    told = scheduler.timesteps
    if objective == "flow":
        t = scheduler.sigmas[:-1]
        # Diffusers cuts the timestep to a whole number, so that the network is told up to 1/1000 less noise.
        difference = timestep("flow", t) - told
        assert difference.min() > -1e-3
        assert difference.max() < 1
    else:
        t = (told + 0.5) / TIMESTEPS
        assert torch.equal(timestep(objective, t), told)
    for trained, sampled in zip(level(objective, t, scheduler.betas), noise_levels(scheduler)):
        assert_close(trained.flatten(), sampled, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sampling_begins_with_noise_and_ends_with_data(objective: Objective) -> None:
    scheduler = schedulers.new(objective)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == TIMESTEPS - 1
    assert scheduler.sigmas[-1] == 0
    assert scheduler.init_noise_sigma == 1, "denoise begins with unit noise"


class Oracle:
    """The best answer there is where each latent is a Gaussian of its own, of mean MEAN and deviation STD."""

    config = SimpleNamespace(get=lambda name, default=None: default)

    def __init__(self, objective: Objective, betas: Tensor) -> None:
        self.objective, self.betas = objective, betas

    def __call__(self, latents: Tensor, told: Tensor, **_: Any) -> tuple[Tensor]:
        t = told / TIMESTEPS if self.objective == "flow" else (told + 0.5) / TIMESTEPS
        alpha, sigma = level(self.objective, t[None].float(), self.betas)
        surprise = (latents - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        x0, noise = MEAN + alpha * STD**2 * surprise, sigma * surprise
        return ({"flow": noise - x0, "eps": noise, "v": alpha * noise - sigma * x0}[self.objective],)


@pytest.mark.parametrize(("steps", "tolerance"), [(20, 0.02), (100, 0.002)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_noise_becomes_data_of_the_right_distribution(objective: Objective, steps: int, tolerance: float) -> None:
    """The flow of a Gaussian keeps each point's place in it, so that even single latents are known."""
    scheduler = schedulers.new(objective)
    noise = initial_noise(range(64), (4, 4, 4))
    unet = Oracle(objective, scheduler.betas)
    drawn = denoise(unet, scheduler, noise, torch.zeros(64, 1, 1), steps=steps, guidance=1.0)
    scheduler.set_timesteps(steps)
    alpha, sigma = noise_levels(scheduler)
    place = (noise - alpha[0] * MEAN) / (alpha[0] ** 2 * STD**2 + sigma[0] ** 2).sqrt()
    # The last step goes from the lowest level to the mean of what the data may be.
    std = STD**2 / (STD**2 + (sigma[-1] / alpha[-1]) ** 2).sqrt()
    assert (drawn - (MEAN + std * place)).abs().mean() < tolerance
    assert abs(drawn.mean() - (MEAN + std * place.mean())) < tolerance
    assert abs(drawn.std() - std * place.std()) < tolerance


# ---- zero terminal SNR


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_zero_terminal_snr_rescales_what_is_left_of_the_data(tmp_path: Path, name: str) -> None:
    """Algorithm 1 of Lin et al.: alpha moves down to end at 0, and is stretched to begin where it began."""
    given = getattr(diffusers, name).from_config(schedulers.new("v").config)
    schedulers.with_zero_terminal_snr(given).save_pretrained(tmp_path)
    scheduler = loading.load_scheduler(str(tmp_path))
    assert type(scheduler).__name__ == name
    assert scheduler.config.rescale_betas_zero_snr
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.beta_end == given.config.beta_end
    t = (torch.arange(TIMESTEPS) + 0.5) / TIMESTEPS
    alpha, sigma = (values.flatten() for values in level("v", t.double(), scheduler.betas))
    before = level("v", t.double(), given.betas)[0].flatten()
    wanted = before[0] * (before - before[-1]) / (before[0] - before[-1])
    assert_close(alpha, wanted, rtol=0, atol=1e-5)
    assert alpha[-1] == 0
    assert sigma[-1] == 1


def test_zero_terminal_snr_twice_is_once() -> None:
    once = schedulers.with_zero_terminal_snr(schedulers.new("v"))
    assert torch.equal(schedulers.with_zero_terminal_snr(once).betas, once.betas)


@pytest.mark.parametrize("objective", ["flow", "eps"])
def test_zero_terminal_snr_is_refused_where_v_is_not_predicted(objective: Objective) -> None:
    with pytest.raises(ModelError, match=f"this one predicts {objective}; leave it out"):
        schedulers.with_zero_terminal_snr(schedulers.new(objective))


def test_zero_terminal_snr_is_refused_where_a_scheduler_does_not_know_it() -> None:
    given = diffusers.PNDMScheduler.from_config(schedulers.with_zero_terminal_snr(schedulers.new("v")).config)
    with pytest.raises(ModelError, match="PNDMScheduler can't sample from zero terminal SNR"):
        schedulers.with_zero_terminal_snr(given)


# ---- the objective of a scheduler


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_objective_is_read_back_from_a_saved_scheduler(tmp_path: Path, objective: Objective) -> None:
    schedulers.new(objective).save_pretrained(tmp_path)
    assert schedulers.objective_of(loading.load_scheduler(str(tmp_path))) == objective


def test_objectives_of_others_schedulers() -> None:
    wanted = {"PNDMScheduler": "eps", "DDIMScheduler": "eps", "FlowMatchEulerDiscreteScheduler": "flow"}
    assert {name: schedulers.objective_of(getattr(diffusers, name)()) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("name", "settings"), [("DDIMScheduler", {"prediction_type": "sample"}), ("EDMEulerScheduler", {})]
)
def test_an_objective_that_is_not_trained_here_is_refused(name: str, settings: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=f"{name} that predicts"):
        schedulers.objective_of(getattr(diffusers, name)(**settings))
