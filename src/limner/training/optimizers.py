"""AdamW as PyTorch has it, schedule-free, or in 8 bits; and Muon for the matrices of layers with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from limner.config import TrainConfig
from limner.errors import ConfigError

BETAS = (0.9, 0.99)
EPS = 1e-8
MOMENTUM = 0.95
RMS = 0.2  # of Muon's update, about AdamW's, so that both take the same learning rate (Liu et al. 2502.16982, eq. 4)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan's quintic, five steps of which suffice
KEPT_FOR_ADAMW = ("embed", "conv_in", "conv_out")  # ends of a network, which Muon is not made for

COUNTS = ("k", "weight_sum", "lr_max")  # what schedule-free AdamW counts by group and not by parameter
TABLES = ("qmap1", "qmap2", "absmax1", "absmax2")  # of 8-bit AdamW's state, which are not shaped as their parameter is
PACKAGES = {"schedule-free": "schedulefree", "adamw-8bit": "bitsandbytes"}


def refuse_missing(kind: str, device: torch.device) -> None:
    """Raise ConfigError where the package or the GPU that an optimiser needs is missing."""
    if kind == "adamw-8bit" and device.type != "cuda":
        raise ConfigError(
            f"optimizer=adamw-8bit needs a CUDA GPU, and trains on {device.type} here; use adamw or muon."
        )
    package = PACKAGES.get(kind)
    if package and find_spec(package) is None:
        raise ConfigError(f"optimizer={kind} needs a package: pip install {package}; or use optimizer=adamw.")


def new(network: nn.Module, config: TrainConfig, rates: Mapping[str, float]) -> torch.optim.Optimizer:
    """An optimiser of what is trained in `network`, in groups that have a `rate` beside AdamW's settings.

    `rates`: the share of the learning rate by parameter's name; 1 for those that it does not name. Weight decay is for
    matrices and kernels only, none for biases, gains and scalars.
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2
            muon = config.optimizer == "muon" and matrix and not any(end in name for end in KEPT_FOR_ADAMW)
            groups.setdefault((rates.get(name, 1.0), matrix, muon), []).append(parameter)
    settings = [
        {"params": params, "rate": rate, "muon": muon, "weight_decay": config.weight_decay if matrix else 0.0}
        for (rate, matrix, muon), params in groups.items()
    ]
    given: dict[str, Any] = {"lr": config.lr, "betas": BETAS, "eps": EPS}
    match config.optimizer:
        case "muon":
            return Muon(settings, lr=config.lr, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
        case "schedule-free":
            from schedulefree import AdamWScheduleFree

            free: torch.optim.Optimizer = AdamWScheduleFree(settings, **given)
            free.train()  # type: ignore[attr-defined]  # and never back: `reached` has what its other mode is for
            return free
        case "adamw-8bit":
            from bitsandbytes.optim import AdamW8bit

            small: torch.optim.Optimizer = AdamW8bit(settings, **given)
            return small
    return torch.optim.AdamW(settings, **given, fused=True)


def reached(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The weights that a training has come to, which the weight average follows.

    Those of the parameters, but for schedule-free AdamW: its parameters y are where it takes gradients, and its result
    is the average x of its iterates z, with y = (1 - beta) z + beta x (Defazio et al. 2405.15682, section 2).
    """
    known = optimizer.state
    return [
        p.detach().lerp(known[p]["z"], 1 - 1 / BETAS[0]) if p in known and "z" in known[p] else p.detach()
        for p in parameters
    ]


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan et al. 2024), for groups with `muon`; AdamW for the others.

    The orthogonal update is scaled to the size of AdamW's (Liu et al. 2502.16982); kernels count as matrices of their
    output channels. Matrices of one shape are made orthogonal together, in `dtype`; for a direction, bf16 is exact
    enough.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(groups, {"lr": lr, "muon": False, "weight_decay": 0.0})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                (self._muon if group["muon"] else self._adamw)(parameters, group["lr"])

    def _muon(self, parameters: list[nn.Parameter], lr: float) -> None:
        shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault((parameter.shape[0], parameter[0].numel()), []).append(parameter)
        for shape, alike in shapes.items():
            updates = []
            for parameter in alike:
                assert parameter.grad is not None
                momentum = self._state(parameter, "momentum")
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                updates.append(parameter.grad.lerp(momentum, MOMENTUM).reshape(shape))  # Nesterov's
            directions = orthogonal(torch.stack(updates).to(self.dtype))  # (K, R, C)
            for parameter, direction in zip(alike, directions):
                parameter.sub_(direction.reshape(parameter.shape), alpha=lr * RMS * max(shape) ** 0.5)

    def _adamw(self, parameters: list[nn.Parameter], lr: float) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            mean, square, step = (self._state(parameter, name) for name in ("exp_avg", "exp_avg_sq", "step"))
            step += 1
            mean.lerp_(parameter.grad, 1 - BETAS[0])
            square.lerp_(parameter.grad.square(), 1 - BETAS[1])
            unbiased = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
            parameter.sub_(mean / unbiased / (1 - BETAS[0] ** step) * lr)

    def _state(self, parameter: nn.Parameter, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            # Steps are counted on the CPU, where a checkpoint puts them too
            state[name] = torch.zeros(()) if name == "step" else torch.zeros_like(parameter)
        value: Tensor = state[name]
        return value


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: all singular values come to lie near 1.

    matrices (K, R, C) -> (K, R, C). Newton–Schulz iteration with Jordan's coefficients (Jordan et al. 2024): each step
    multiplies by a polynomial of the matrix's products with itself. Where these are much smaller than the matrix, the
    polynomials are multiplied first, which takes a third of the time for kernels; in fp32 alone, as the products of
    products need its digits.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # (K, R, C), R <= C from here on
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    rows, columns = x.shape[-2:]
    if x.dtype == torch.float32 and columns >= 2 * rows:
        gram = x @ x.mT  # (K, R, R)
        turn = factor = _polynomial(gram)
        for _ in range(steps - 1):
            gram = factor @ gram @ factor  # all are polynomials of the first, so they commute
            factor = _polynomial(gram)
            turn = factor @ turn
        x = turn @ x
    else:
        for _ in range(steps):
            x = _polynomial(x @ x.mT) @ x
    return x.mT if tall else x


def _polynomial(gram: Tensor) -> Tensor:
    """a + b A + c A^2 of symmetric matrices A (K, R, R) -> (K, R, R)."""
    a, b, c = NEWTON_SCHULZ
    value = b * gram + c * gram @ gram
    value.diagonal(dim1=-2, dim2=-1).add_(a)
    return value
