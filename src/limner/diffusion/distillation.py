"""What a few-step student learns from its teacher: one pure function an equation, for every objective alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from limner.diffusion.objectives import Objective

Level = tuple[Tensor, Tensor]
"""alpha and sigma, which broadcast with latents."""


def data_of(objective: Objective, predicted: Tensor, noised: Tensor, level: Level) -> Tensor:
    """x0 that a prediction for noised latents (N, C, h, w) means -> (N, C, h, w); `objectives.target`, solved for x0.

    eps: Ho et al. 2006.11239, equation 15; v: Salimans and Ho 2202.00512, appendix D.
    """
    alpha, sigma = level
    if objective == "flow":
        return noised - sigma * predicted
    if objective == "v":
        return alpha * noised - sigma * predicted
    return (noised - sigma * predicted) / alpha


def noise_of(x0: Tensor, noised: Tensor, level: Level) -> Tensor:
    """The noise in latents (N, C, h, w) whose data is x0 -> (N, C, h, w)."""
    alpha, sigma = level
    return (noised - alpha * x0) / sigma


def ddim(x0: Tensor, noised: Tensor, here: Level, there: Level) -> Tensor:
    """One deterministic step from a noise level to a lower one (Song et al. 2010.02502, equation 12 with eta 0).

    x0, noised (N, C, h, w) -> (N, C, h, w).
    """
    alpha, sigma = there
    return alpha * x0 + sigma * noise_of(x0, noised, here)


def midpoint(x0: Tensor, halfway: Tensor, noised: Tensor, levels: tuple[Level, Level, Level]) -> Tensor:
    """One step of second order from the first of three noise levels to the last, by what is seen at the second.

    x0 is the data seen in the latents `halfway`, at the second level; all (N, C, h, w) -> (N, C, h, w). The midpoint
    method on the probability flow (Song et al. 2011.13456, equation 13) as d noised = x0 d alpha + noise d sigma.
    """
    here, half, there = levels
    return noised + (there[0] - here[0]) * x0 + (there[1] - here[1]) * noise_of(x0, halfway, half)


def landing(noised: Tensor, landed: Tensor, here: Level, there: Level) -> Tensor:
    """x0 whose one `ddim` step takes `noised` to `landed`: what a student must answer to go there in one step.

    noised, landed (N, C, h, w) -> (N, C, h, w). Salimans and Ho 2202.00512, algorithm 2.
    """
    ratio = there[1] / here[1]
    return (landed - ratio * noised) / (there[0] - ratio * here[0])


def weight(level: Level) -> Tensor:
    """Weight of the squared error in x0: the signal to noise, but 1 at least (Salimans and Ho, section 4)."""
    alpha, sigma = level
    return (alpha / sigma).square().clamp(min=1)


@dataclass(frozen=True)
class Grid:
    """The noise levels that a student steps through, and finer ones between for its teacher.

    Level `j * substeps` is where the student's step j begins; the last level, of data, has sigma 0.
    """

    steps: int
    substeps: int
    timesteps: Tensor  # (steps * substeps,)
    alphas: Tensor  # (steps * substeps + 1,)
    sigmas: Tensor  # (steps * substeps + 1,)

    @classmethod
    def of(cls, scheduler: Any, objective: Objective, steps: int, substeps: int) -> Grid:
        """As `schedulers.for_few_steps` made `scheduler`, whose levels for more steps contain those for fewer."""
        scheduler.set_timesteps(steps * substeps)
        sigmas = scheduler.sigmas.float()
        if objective == "flow":
            return cls(steps, substeps, scheduler.timesteps, 1 - sigmas, sigmas)
        alphas = 1 / (1 + sigmas.square()).sqrt()  # Diffusers counts sigma as a share of alpha
        return cls(steps, substeps, scheduler.timesteps, alphas, sigmas * alphas)

    def level(self, places: Tensor) -> Level:
        """alpha and sigma at places (N,) of the finer grid -> (N, 1, 1, 1) each."""
        alphas, sigmas = self.alphas.to(places.device)[places], self.sigmas.to(places.device)[places]
        return alphas[:, None, None, None], sigmas[:, None, None, None]

    def descend(
        self,
        objective: Objective,
        noised: Tensor,
        places: Tensor,
        predict: Callable[[Tensor, Tensor], Tensor],
        *,
        in_pairs: bool,
    ) -> Tensor:
        """Follow a teacher from places (N,) of the finer grid through `substeps` small steps.

        noised (N, C, h, w) -> (N, C, h, w). `predict` answers noised latents at timesteps (N,). `in_pairs` makes one
        `midpoint` step of two, for a teacher that answers what is true of a level and not of the way to the next.
        """
        timesteps = self.timesteps.to(places.device)

        def seen(latents: Tensor, step: int) -> Tensor:
            predicted = predict(latents, timesteps[places + step])
            return data_of(objective, predicted, latents, self.level(places + step))

        step = 0
        while step < self.substeps:
            here, half = self.level(places + step), self.level(places + step + 1)
            halfway = ddim(seen(noised, step), noised, here, half)
            if in_pairs and step + 2 <= self.substeps:
                there = self.level(places + step + 2)
                noised = midpoint(seen(halfway, step + 1), halfway, noised, (here, half, there))
                step += 2
            else:
                noised = halfway
                step += 1
        return noised
