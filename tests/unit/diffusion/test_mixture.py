"""Sampling with the best network there is draws a mixture of Gaussians as it is, whatever objective and solver.

What the network answers comes from the functions that training uses, so that any difference between what training
means and what a solver takes it for would show.
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from limner.diffusion import schedulers
from limner.diffusion.objectives import TIMESTEPS, Objective, level
from limner.generation.engine import denoise, initial_noise
from mixtures import THREE, Best, Mixture

TRAILING = {"timestep_spacing": "trailing", "clip_sample": False}
SOLVERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "dpm": ("DPMSolverMultistepScheduler", {}, 50),
    "unipc": ("UniPCMultistepScheduler", {}, 50),
    "ddim": ("DDIMScheduler", TRAILING, 50),
    "euler": ("EulerDiscreteScheduler", TRAILING, 50),
    "ddpm": ("DDPMScheduler", TRAILING, 200),
    "deis": ("DEISMultistepScheduler", {}, 50),
    "singlestep": ("DPMSolverSinglestepScheduler", {}, 50),
}
"""Class, settings and steps."""
FITTING = {
    "flow": ("dpm", "unipc", "deis", "singlestep"),
    "eps": ("dpm", "unipc", "ddim", "euler", "ddpm"),
    "v": ("dpm", "unipc", "ddim", "euler", "ddpm"),
}
CASES = [(objective, solver, False) for objective, solvers in FITTING.items() for solver in solvers]
CASES += [("v", solver, True) for solver in FITTING["v"]]


def sampler(objective: Objective, solver: str, zero: bool) -> tuple[Any, int]:
    """A solver made of our own scheduler's configuration, as users exchange them, and its steps."""
    ours = schedulers.new(objective)
    name, settings, steps = SOLVERS[solver]
    if zero:
        ours = schedulers.with_zero_terminal_snr(ours)
        settings = {key: value for key, value in settings.items() if key != "timestep_spacing"}  # ours says it
    return getattr(diffusers, name).from_config(ours.config, **settings), steps


@pytest.mark.parametrize(("objective", "solver", "zero"), CASES)
def test_modes_and_their_shares_are_drawn_as_they_are(objective: Objective, solver: str, zero: bool) -> None:
    """Shares within 0.02 of 16,384 draws, whose own error is 0.004; centres within 0.02, deviations within a fifth."""
    scheduler, steps = sampler(objective, solver, zero)
    best = Best(THREE, objective, getattr(scheduler, "betas", None))
    noise = initial_noise(range(256), (2, 8, 8))
    drawn = denoise(best, scheduler, noise, torch.zeros(256, 1, 1), steps=steps, guidance=1.0)
    shares, centres, std = THREE.found(drawn)
    assert (shares - THREE.shares).abs().max() < 0.02
    assert (centres - THREE.modes).abs().max() < 0.02
    assert (std / THREE.std - 1).abs().max() < 0.2


# ---- zero terminal SNR

BRIGHT = Mixture(torch.tensor([[-3.0], [3.0]]), torch.tensor([0.1, 0.9]), 0.2)
"""Of a mean far from that of noise, as pictures that are dark or bright all over."""
QUANTILES = torch.from_numpy(stats.norm.ppf((np.arange(4096) + 0.5) / 4096)).float()


def share_of_the_first(solver: str, zero: bool) -> float:
    """Which share of the quantiles of noise is drawn as the first mode of `BRIGHT`; no solver here changes order."""
    scheduler, steps = sampler("v", solver, zero)
    noise = QUANTILES.reshape(1, 1, 64, 64)
    best = Best(BRIGHT, "v", scheduler.betas)
    return float(BRIGHT.found(denoise(best, scheduler, noise, torch.zeros(1, 1, 1), steps=steps, guidance=1.0))[0][0])


@pytest.mark.parametrize("solver", ["dpm", "ddim", "euler", "unipc"])
def test_only_zero_terminal_snr_draws_bright_pictures_as_often_as_they_are(solver: str) -> None:
    assert abs(share_of_the_first(solver, True) - 0.1) < 0.005
    # What plain noise begins with is right of where training ended, by what is left of the mean
    alpha, sigma = (float(x) for x in level("v", torch.ones(1), schedulers.new("v").betas))
    mean, std = alpha * (0.9 - 0.1) * 3, np.hypot(alpha * 3 * 0.6, sigma)
    skewed = stats.norm.cdf(mean + std * stats.norm.ppf(0.1))
    assert skewed > 0.12
    assert abs(share_of_the_first(solver, False) - skewed) < 0.01


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
@pytest.mark.parametrize("solver", FITTING["v"])
def test_zero_terminal_snr_samples_from_the_last_timestep(solver: str, steps: int) -> None:
    scheduler, _ = sampler("v", solver, True)
    best = Best(THREE, "v", scheduler.betas)
    given: list[Tensor] = []

    def network(latents: Tensor, told: Tensor, **others: Any) -> tuple[Tensor]:
        given.append(latents)
        return best(latents, told, **others)

    network.config = {}  # type: ignore[attr-defined]
    noise = initial_noise(range(2), (2, 8, 8))
    denoise(network, scheduler, noise, torch.zeros(2, 1, 1), steps=steps, guidance=1.0)
    assert best.told[0] == TIMESTEPS - 1
    assert len(best.told) == steps
    assert level("v", torch.ones(1), scheduler.betas)[0] == 0, "the network is told that nothing is left of the picture"
    assert torch.allclose(given[0], noise, atol=1e-3)
