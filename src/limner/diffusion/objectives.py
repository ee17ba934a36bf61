"""What a U-Net is trained to predict, at which noise levels, and what of it counts: one pure function an equation.

Noised latents are `alpha x0 + sigma noise` throughout. x0 is always data. t is a share in (0, 1]: 0 is data, 1 is
noise; a network is told `1000 t`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Objective = Literal["flow", "eps", "v"]
Levels = Literal["logit-normal", "uniform", "cosine"]
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


def min_snr(objective: Objective, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Weight of the squared error at each level. alpha, sigma (N, 1, 1, 1) -> (N,).

    The error in x0 counts min(SNR, gamma), where SNR = alpha^2 / sigma^2 (Hang et al. 2303.09556, section 3.4). As a
    weight of the error in eps that is min(SNR, gamma) / SNR, and of the error in v min(SNR, gamma) / (SNR + 1), as
    the paper has it. With flow x0 = noised - sigma flow, so there it is min(SNR, gamma) sigma^2, the same as for v.
    """
    if objective == "eps":
        return (gamma * sigma.square() / alpha.square()).clamp(max=1).flatten()
    return torch.minimum(alpha.square(), gamma * sigma.square()).flatten()


def mean_error(errors: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of each picture's errors, or of those that its mask lets in. errors (N, C, h, w) -> (N,).

    mask (N, 1, h, w), at least 0: how much each place of the latents counts. Each picture counts the same, however
    little of it is let in; one that is masked out altogether has no error. Without a mask it is Ho et al.'s mean
    (2006.11239, equation 14).
    """
    if mask is None:
        return errors.mean(dim=(1, 2, 3))
    counted = mask.sum(dim=(1, 2, 3)) * errors.shape[1]  # (N,)
    return (errors * mask).sum(dim=(1, 2, 3)) / counted.clamp(min=torch.finfo(counted.dtype).tiny)


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


def usual_levels(objective: Objective) -> Levels:
    """What such models are trained with: Stable Diffusion 3 (Esser et al.); 1 and 2 (Ho et al. 2006.11239)."""
    return "logit-normal" if objective == "flow" else "uniform"


def draw_t(levels: Levels, rng: np.random.Generator) -> float:
    """A noise level for training, in (0, 1].

    logit-normal: the logistic function of a unit Gaussian, which favours the middle and all but never draws the ends
    (Esser et al. 2403.03206, equation 19 with m = 0, s = 1).
    cosine: of density 2 / (pi (1 - 2t + 2t^2)), so that in flow the signal-to-noise ratios are those of Nichol and
    Dhariwal's cosine schedule (CosMap of Esser et al., section 3.1); it favours the middle a little.
    """
    if levels == "logit-normal":
        return float(1 / (1 + np.exp(-rng.standard_normal())))
    u = 1 - rng.random()  # (0, 1]
    if levels == "cosine":
        # Esser et al.'s 1 - 1 / (tan + 1), which is sound at both ends
        alpha, sigma = np.cos(np.pi / 2 * u), np.sin(np.pi / 2 * u)
        return float(sigma / (alpha + sigma))
    return float(u)


def draw_noise(shape: Sequence[int], rng: np.random.Generator, offset: float = 0.0) -> Tensor:
    """Unit Gaussian noise of `shape` (..., h, w), and `offset` times a unit Gaussian more, one a channel, if above 0.

    What is added is the same all over a picture, which teaches its brightness (Guttenberg, "Diffusion with Offset
    Noise", 2023).
    """
    noise = torch.from_numpy(rng.standard_normal(shape, np.float32))
    if offset:
        noise += offset * torch.from_numpy(rng.standard_normal((*shape[:-2], 1, 1), np.float32))  # (..., 1, 1)
    return noise
