"""How sure a figure is: bootstrap intervals, and tests of the difference of two models on the same prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 1_000
HALVES = 200  # each is a whole computation of the statistic


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval, and from how many pictures it is."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Of a first model's figure less a second's, with its 95 % interval, and how likely chance alone is this large."""

    value: float
    low: float
    high: float
    p: float
    count: int


def mean_interval(values: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of one number a picture (N,), with its bootstrap percentile interval.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    values = values.double()
    means = torch.stack([values[draw].mean() for draw in _draws(len(values), resamples, seed)])
    low, high = _ends(means)
    return Interval(values.mean().item(), low, high, len(values))


def set_interval(
    statistic: Callable[[Tensor, Tensor], float], real: Tensor, fake: Tensor, resamples: int = HALVES, seed: int = 0
) -> Interval:
    """A statistic of two sets of features (N, D) and (M, D), with the interval of a bootstrap of halves.

    Each resample is a random half of each set without repetition: a picture drawn twice would be its own nearest
    neighbour, and distances would fall for that. A half without replacement strays from its whole as far as the whole
    does from the truth (Politis and Romano 1994; Shao and Wu 1989 for the scale); but statistics of a half are
    biased, so it is the spread about their own mean that is laid around the value.
    """
    value = statistic(real, fake)
    found = [
        statistic(real[rows], fake[columns])
        for rows, columns in zip(_halves(len(real), resamples, seed), _halves(len(fake), resamples, seed + 1))
    ]
    low, high = _around(value, torch.tensor(found, dtype=torch.double))
    return Interval(value, low, high, len(fake))


def paired_difference(one: Tensor, other: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Mean difference of two models' numbers of the same N prompts and noise, (N,) each.

    The interval is a bootstrap of prompts; p is that of the paired randomisation test, two-sided: each prompt's two
    numbers change places at random (Fisher 1935; Efron and Tibshirani 1993, chapter 15).
    """
    gaps = one.double() - other.double()  # (N,)
    means = torch.stack([gaps[draw].mean() for draw in _draws(len(gaps), resamples, seed)])
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (resamples, len(gaps)), generator=generator).double() * 2 - 1  # (R, N)
    low, high = _ends(means)
    value = gaps.mean().item()
    return Difference(value, low, high, _p(value, signs @ gaps / len(gaps)), len(gaps))


def paired_set_difference(
    statistic: Callable[[Tensor, Tensor], float],
    real: Tensor,
    one: Tensor,
    other: Tensor,
    resamples: int = HALVES,
    seed: int = 0,
) -> Difference:
    """Difference of a statistic of two models' features (N, D) of the same prompts and noise, against real (M, D).

    Interval as in `set_interval`, with the same halves for both; p as in `paired_difference`.
    """
    value = statistic(real, one) - statistic(real, other)
    halves = zip(_halves(len(real), resamples, seed), _halves(len(one), resamples, seed + 1))
    found = [statistic(real[rows], one[draw]) - statistic(real[rows], other[draw]) for rows, draw in halves]
    generator = torch.Generator().manual_seed(seed)
    chance = []
    for _ in range(resamples):
        swap = torch.randint(2, (len(one), 1), generator=generator, dtype=torch.bool)  # (N, 1)
        chance.append(statistic(real, one.where(~swap, other)) - statistic(real, other.where(~swap, one)))
    low, high = _around(value, torch.tensor(found, dtype=torch.double))
    return Difference(value, low, high, _p(value, torch.tensor(chance, dtype=torch.double)), len(one))


def _draws(count: int, resamples: int, seed: int) -> list[Tensor]:
    """Rows with repetition, as many as there are."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(count, (count,), generator=generator) for _ in range(resamples)]


def _halves(count: int, resamples: int, seed: int) -> list[Tensor]:
    """Half of the rows, none twice."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator)[: (count + 1) // 2] for _ in range(resamples)]


def _ends(found: Tensor) -> tuple[float, float]:
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.double)
    low, high = found.quantile(ends).tolist()
    return low, high


def _around(value: float, found: Tensor) -> tuple[float, float]:
    low, high = _ends(found - found.mean())
    return value + low, value + high


def _p(value: float, chance: Tensor) -> float:
    """Share of differences by chance that are as large, the one that was found counted in."""
    as_large = (chance.abs() >= abs(value) * (1 - 1e-12)).sum().item()
    return (as_large + 1) / (len(chance) + 1)
