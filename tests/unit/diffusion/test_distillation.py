"""Few-step students: what they are to answer is what takes Diffusers' own scheduler to where the teacher went."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from limner.diffusion import schedulers
from limner.diffusion.distillation import Grid, data_of, ddim, landing, noise_of, weight
from limner.diffusion.objectives import TIMESTEPS, Objective, add_noise, target

OBJECTIVES: dict[Objective, Any] = {
    "flow": lambda: schedulers.new("flow"),
    "eps": lambda: schedulers.new("eps"),
    "v": lambda: DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
}
EACH = pytest.mark.parametrize("objective", list(OBJECTIVES))


def level(alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    return torch.full((1, 1, 1, 1), alpha, dtype=torch.float64), torch.full((1, 1, 1, 1), sigma, dtype=torch.float64)


@EACH
@settings(max_examples=30)
@given(share=st.floats(0.02, 0.98), seed=st.integers(0, 99))
def test_a_perfect_prediction_means_its_data_and_noise(objective: Objective, share: float, seed: int) -> None:
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    here = level(1 - share, share) if objective == "flow" else level((1 - share**2) ** 0.5, share)
    noised = add_noise(x0, noise, *here)
    predicted = target(objective, x0, noise, *here)
    assert_close(data_of(objective, predicted, noised, here), x0)
    assert_close(noise_of(x0, noised, here), noise)


@settings(max_examples=30)
@given(high=st.floats(0.1, 1), low=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_landing_is_a_step_solved_for_its_data(high: float, low: float, seed: int) -> None:
    here, there = level(1 - high, high), level(1 - high * low, high * low)
    x0, noised = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert_close(landing(noised, ddim(x0, noised, here, there), here, there), x0, rtol=1e-6, atol=1e-6)


@EACH
@pytest.mark.parametrize(("steps", "substeps", "in_pairs"), [(1, 6, False), (4, 4, True), (8, 3, True)])
def test_the_scheduler_goes_where_the_teacher_went(
    objective: Objective, steps: int, substeps: int, in_pairs: bool
) -> None:
    """A student that answers what it was to learn draws, in plain Diffusers, what its teacher draws."""
    scheduler = schedulers.for_few_steps(OBJECTIVES[objective]())
    assert schedulers.objective_of(scheduler) == objective
    grid = Grid.of(scheduler, objective, steps, substeps)
    torch.manual_seed(0)
    drift = torch.randn(4, 4, dtype=torch.float64) / 4

    def predict(noised: Tensor, timesteps: Tensor) -> Tensor:
        turned = torch.einsum("ij,njhw->nihw", drift, noised.double())
        return (turned * (1 + timesteps[:, None, None, None] / TIMESTEPS)).float()

    latents = torch.randn(3, 4, 2, 2)
    scheduler.set_timesteps(steps)
    drawn = latents * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        places = torch.full((3,), step * substeps)
        here, there = grid.level(places), grid.level(places + substeps)
        latents_there = grid.descend(objective, latents, places, predict, in_pairs=in_pairs)
        x0 = landing(latents, latents_there, here, there)
        answer = target(objective, x0, noise_of(x0, latents, here), *here)
        assert timestep == grid.timesteps[step * substeps], "the network is told the same"
        drawn = scheduler.step(answer, timestep, drawn).prev_sample
        latents = latents_there
        assert_close(drawn, latents, rtol=1e-3, atol=1e-3)
    assert grid.sigmas[-1] == 0


@EACH
def test_pairs_of_substeps_are_of_second_order(objective: Objective) -> None:
    """Data of one Gaussian, of which all is known: twice the substeps leave under a third of the error, not half."""
    scheduler = schedulers.for_few_steps(OBJECTIVES[objective]())
    deviation, noised = 0.5, torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def gone(substeps: int, in_pairs: bool) -> Tensor:
        """From the first of four steps' second to its third, clear of both ends."""
        grid = Grid.of(scheduler, objective, 4, substeps)
        levels = {int(t): grid.level(torch.tensor([place])) for place, t in enumerate(grid.timesteps)}

        def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
            alpha, sigma = here = levels[int(timesteps[0])]
            x0 = alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2) * latents
            return target(objective, x0, noise_of(x0, latents, here), *here)

        return grid.descend(objective, noised, torch.full((64,), substeps), predict, in_pairs=in_pairs)

    exact = gone(50, True)
    errors = {pairs: [(gone(n, pairs) - exact).norm().item() for n in (4, 8)] for pairs in (False, True)}
    assert errors[False][0] / errors[False][1] == pytest.approx(2, rel=0.35)
    assert errors[True][0] / errors[True][1] > 3
    assert errors[True][0] < errors[False][0] / 4


@EACH
def test_levels_are_those_of_training(objective: Objective) -> None:
    given_ = OBJECTIVES[objective]()
    grid = Grid.of(schedulers.for_few_steps(given_), objective, 4, 5)
    told = grid.timesteps
    assert len(told) == 20
    assert torch.equal(told, told.sort(descending=True).values)
    assert told[0] == TIMESTEPS - 1, "it begins at pure noise"
    if objective == "flow":
        assert_close(grid.sigmas[:-1] * TIMESTEPS, told.float(), rtol=0, atol=1)
        assert_close(grid.alphas, 1 - grid.sigmas)
    else:
        kept = torch.cumprod(1 - given_.betas.double(), dim=0)[told]
        assert_close(grid.alphas[:-1], kept.sqrt().float())
        assert_close(grid.sigmas[:-1], (1 - kept).sqrt().float())


def test_the_levels_of_a_given_scheduler_are_kept() -> None:
    euler = EulerDiscreteScheduler(beta_schedule="linear", beta_start=0.001, beta_end=0.01)
    assert_close(schedulers.for_few_steps(euler).betas, euler.betas)
    shifted = schedulers.for_few_steps(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert shifted.config["flow_shift"] == 3
    assert shifted.config["prediction_type"] == "flow_prediction"


def test_the_weight_is_the_signal_to_noise_and_one_at_least() -> None:
    assert weight(level(0.8, 0.4)).item() == pytest.approx(4)
    assert weight(level(0.1, 0.9)).item() == 1
