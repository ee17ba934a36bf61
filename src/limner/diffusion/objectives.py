"""What a U-Net is trained to predict, and at which noise levels: one pure function an equation.

Noised latents are `alpha x0 + sigma noise` throughout. x0 is always data. t is a share in (0, 1]: 0 is data, 1 is
noise; a network is told `1000 t`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Objective = Literal["flow", "eps", "v"]
TIMESTEPS = 1000  # t = 1 in a network's own counting, as Diffusers' schedulers have it


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Latents at a noise level. x0, noise (N, C, h, w), alpha, sigma (N, 1, 1, 1) -> (N, C, h, w)."""
    return alpha * x0 + sigma * noise


def target(objective: Objective, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network should answer. x0, noise (N, C, h, w), alpha, sigma (N, 1, 1, 1) -> (N, C, h, w).

    flow: noise - x0, the velocity of the straight path (Liu et al. 2209.03003, equation 1).
    eps: noise (Ho et al. 2006.11239, equation 14).
    v: alpha noise - sigma x0 (Salimans and Ho 2202.00512, section 4).
    """
    if objective == "flow":
        return noise - x0
    if objective == "v":
        return alpha * noise - sigma * x0
    return noise


def level(objective: Objective, t: Tensor, betas: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """alpha and sigma at t (N,) -> (N, 1, 1, 1) each.

    flow: 1 - t and t. eps and v: of the variance-preserving process with the scheduler's `betas` (1000,), at the
    step that t falls on (Ho et al. 2006.11239, equation 4).
    """
    if objective == "flow":
        alpha, sigma = 1 - t, t
    else:
        assert betas is not None, "eps and v need the scheduler's betas"
        kept = torch.cumprod(1 - betas.double(), dim=0)[step_of(t)]  # (N,)
        alpha, sigma = kept.sqrt().to(t), (1 - kept).sqrt().to(t)
    return alpha[:, None, None, None], sigma[:, None, None, None]


def step_of(t: Tensor) -> Tensor:
    """The training step, 0 to 999, that t (N,) in (0, 1] falls on -> (N,) int64."""
    return (t * TIMESTEPS).ceil().long().clamp(1, TIMESTEPS) - 1


def timestep(objective: Objective, t: Tensor) -> Tensor:
    """What the network is told of t (N,): in flow 1000 t, otherwise the step -> (N,)."""
    return t * TIMESTEPS if objective == "flow" else step_of(t)


def draw_t(levels: Literal["logit-normal", "uniform"], rng: np.random.Generator) -> float:
    """A noise level for training, in (0, 1].

    logit-normal: the logistic function of a unit Gaussian, which favours the middle (Esser et al. 2403.03206,
    equation 19 with m = 0, s = 1).
    """
    if levels == "logit-normal":
        return float(1 / (1 + np.exp(-rng.standard_normal())))
    return float(1 - rng.random())
