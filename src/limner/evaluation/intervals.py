"""How sure a figure is: bootstrap intervals, and tests of the difference of two models on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 1_000
HALVES = 200  # each is a whole computation of the statistic
MOST = 1_000  # pictures of a set in one such computation, so that it takes no longer for more pictures


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


def mean_interval(values: Tensor, owners: Tensor | None = None, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of numbers (M,), with its bootstrap percentile interval; `owners` (M,) tell the picture that each is of.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. It is pictures that are drawn, each with
    all its numbers, since those are not independent; without owners each number is another picture's.
    """
    values = values.double()
    owners = torch.arange(len(values)) if owners is None else owners.unique(return_inverse=True)[1]
    numbers = owners.bincount().double()  # (N,) of each picture
    sums = torch.zeros_like(numbers).index_add(0, owners, values)  # (N,)
    means = torch.stack([sums[draw].sum() / numbers[draw].sum() for draw in _draws(len(sums), resamples, seed)])
    low, high = _ends(means)
    return Interval(values.mean().item(), low, high, len(sums))


def set_intervals(
    statistics: Callable[[Tensor, Tensor], Mapping[str, float]],
    real: Tensor,
    fake: Tensor,
    resamples: int = HALVES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Statistics by name of two sets of features (N, D) and (M, D), with the intervals of a bootstrap of halves.

    Each resample is a random half of each set without repetition: a picture drawn twice would be its own nearest
    neighbour, and distances would fall for that. A half without replacement strays from its whole as far as the whole
    does from the truth (Politis and Romano 1994; Shao and Wu 1989 for the scale), and less than a half, which is what
    is taken of more than `MOST`, strays sqrt((1 - share) / share) times as far. But statistics of a part are biased, so
    it is the spread about their own mean that is laid around the value.
    """
    values = statistics(real, fake)
    share = _share(real, fake)
    parts = zip(_parts(len(real), share, resamples, seed), _parts(len(fake), share, resamples, seed + 1))
    found = [statistics(real[rows], fake[columns]) for rows, columns in parts]
    intervals = {}
    for name, value in values.items():
        spread = torch.tensor([one[name] for one in found], dtype=torch.double)
        intervals[name] = Interval(value, *_around(value, spread, share), len(fake))
    return intervals


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

    What the statistic tells of `real` alone may be left out of it, as it cancels. Interval as in `set_intervals`, with
    the same parts for both; p as in `paired_difference`, of more than `MOST` pictures of either by so many of them.
    """
    value = statistic(real, one) - statistic(real, other)
    share = _share(real, one)
    parts = zip(_parts(len(real), share, resamples, seed), _parts(len(one), share, resamples, seed + 1))
    found = [statistic(real[rows], one[draw]) - statistic(real[rows], other[draw]) for rows, draw in parts]
    low, high = _around(value, torch.tensor(found, dtype=torch.double), share)
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(one), generator=generator)[:MOST].sort().values
    mine, its = one[some], other[some]
    tested = value
    if max(len(real), len(one)) > MOST:
        real = real[torch.randperm(len(real), generator=generator)[:MOST].sort().values]
        tested = statistic(real, mine) - statistic(real, its)
    chance = []
    for _ in range(resamples):
        swap = torch.randint(2, (len(mine), 1), generator=generator, dtype=torch.bool)  # (N, 1)
        chance.append(statistic(real, torch.where(swap, its, mine)) - statistic(real, torch.where(swap, mine, its)))
    return Difference(value, low, high, _p(tested, torch.tensor(chance, dtype=torch.double)), len(one))


def _draws(count: int, resamples: int, seed: int) -> list[Tensor]:
    """Rows with repetition, as many as there are."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(count, (count,), generator=generator) for _ in range(resamples)]


def _share(real: Tensor, fake: Tensor) -> float:
    """Of both sets in a resample: at most a half, and of the smaller one at least as many as have 3 neighbours."""
    fewer, more = sorted((len(real), len(fake)))
    return min(0.5, max(MOST / more, 4 / fewer))


def _parts(count: int, share: float, resamples: int, seed: int) -> list[Tensor]:
    """A share of the rows, none twice."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator)[: math.ceil(count * share)] for _ in range(resamples)]


def _ends(found: Tensor) -> tuple[float, float]:
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.double)
    low, high = found.quantile(ends).tolist()
    return low, high


def _around(value: float, found: Tensor, share: float) -> tuple[float, float]:
    """The ends of an interval around a value, by what parts of that share found."""
    low, high = _ends((found - found.mean()) * (share / (1 - share)) ** 0.5)
    return value + min(low, 0.0), value + max(high, 0.0)  # where nearly all parts agree, a few put both on one side


def _p(value: float, chance: Tensor) -> float:
    """Share of differences by chance that are as large, the one that was found counted in."""
    as_large = (chance.abs() >= abs(value) * (1 - 1e-12)).sum().item()
    return (as_large + 1) / (len(chance) + 1)
