"""How far one set of pictures is from another, by features of each: distances of distributions, and what they share.

All take float features of any extractor and compute in float64, since sums of many small terms decide here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

SIGMA, SCALE = 10.0, 1000.0
"""Width of CMMD's kernel, and what the distance is multiplied with to be read well; as the authors have them."""
BLOCK = 1024  # rows of a matrix of pairs at once


class Moments:
    """Mean and covariance of features that come batch by batch, and none of which is kept.

    Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979),
    equation 2.1, for vectors.
    """

    def __init__(self, width: int) -> None:
        """Of no features yet, which are to be (N, width)."""
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.double)  # (D,)
        self.scatter = torch.zeros(width, width, dtype=torch.double)  # (D, D)

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of features (N, D)."""
        moments = cls(features.shape[1])
        moments.update(features)
        return moments

    def update(self, features: Tensor) -> None:
        """Count features (N, D) in."""
        for part in features.split(BLOCK) if len(features) else ():  # which would give one part of none
            rows = part.double()
            count, mean = len(rows), rows.mean(dim=0)
            total, step = self.count + count, mean - self.mean
            self.scatter += (rows - mean).T @ (rows - mean) + torch.outer(step, step) * (self.count * count / total)
            self.mean += step * (count / total)
            self.count = total

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (D, D); of two features or more."""
        assert self.count > 1
        return self.scatter / (self.count - 1)


def frechet(one: Moments, other: Moments) -> float:
    """Fréchet distance of two Gaussians of these moments; Heusel et al. (1706.08500), equation 6.

    |m - n|^2 + tr(S) + tr(T) - 2 tr((S T)^(1/2)). It falls with the number of features: compare only figures from
    equally many.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp(min=0).sqrt()  # (D, D), S = root root^T
    # S T and root^T T root have the same eigenvalues, and the second is symmetric
    shared = torch.linalg.eigvalsh(root.T @ other.covariance @ root).clamp(min=0).sqrt().sum()
    spread = one.covariance.trace() + other.covariance.trace() - 2 * shared
    return float((one.mean - other.mean).square().sum() + spread)


def frechet_of(one: Tensor, other: Tensor) -> float:
    """`frechet` of features (N, D) and (M, D) themselves, which is sooner where they are fewer than they are wide.

    With centred features A and B, tr((S T)^(1/2)) is the sum of the singular values of A B^T.
    """
    if len(one) * len(other) > one.shape[1] ** 2:
        return frechet(Moments.of(one), Moments.of(other))
    one, other = one.double(), other.double()
    a, b = ((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (one, other))
    shared = torch.linalg.svdvals(a @ b.T).sum()
    return float(
        (one.mean(dim=0) - other.mean(dim=0)).square().sum() + a.square().sum() + b.square().sum() - 2 * shared
    )


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Kernel distance (KID): squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, without bias.

    Bińkowski et al. (1801.01401), section 3.1, with the estimator of Gretton et al. 2012, lemma 6, over all pairs of
    features (N, D) and (M, D): what the mean over random subsets, as torch-fidelity takes it, tends to. So it may be
    below 0 for sets that are alike.
    """
    return _kernel_mean(real, real, own=True) + kernel_rest(real, fake)


def kernel_rest(real: Tensor, fake: Tensor) -> float:
    """`kernel_distance` without what is of `real` alone, which cancels where two sets are compared."""
    return _kernel_mean(fake, fake, own=True) - 2 * _kernel_mean(real, fake)


def _kernel_mean(one: Tensor, other: Tensor, own: bool = False) -> float:
    """Mean polynomial kernel over all pairs of rows; of one set with itself, without each row's pair with itself."""
    total, width = 0.0, one.shape[1]
    for rows, columns in _tiles(one, other):
        total += (rows @ columns.T / width + 1).pow(3).sum().item()  # of (BLOCK, BLOCK)
    if own:
        total -= sum((rows.double().square().sum(dim=1) / width + 1).pow(3).sum().item() for rows in one.split(BLOCK))
    return total / (len(one) * (len(other) - own))


def _tiles(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of rows in float64, a block of each set at a time: of large sets neither the matrix of pairs nor the
    sets themselves, which may be files, come into memory whole.
    """
    for rows in one.split(BLOCK):
        wide = rows.double()
        yield from ((wide, columns.double()) for columns in other.split(BLOCK))


def cmmd(one: Tensor, other: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets of features of unit length, (N, E) and (M, E), times 1000.

    Jayasumana et al. (2401.09603), section 4, with a Gaussian kernel of sigma 10. Their equation 4 leaves out the pairs
    of a picture with itself; their reference implementation, whose figures others report, keeps them (Gretton et al.
    2012, equation 5), and so does this. So it is 0 for equal sets, never below 0 but for rounding, and above 0
    for two small samples of the same pictures: compare only figures from equally many.
    """
    return SCALE * _mean_kernel(one, one) + cmmd_rest(one, other)


def cmmd_rest(one: Tensor, other: Tensor) -> float:
    """`cmmd` without what is of `one` alone, which cancels where two others are compared."""
    return SCALE * (_mean_kernel(other, other) - 2 * _mean_kernel(one, other))


def _mean_kernel(one: Tensor, other: Tensor) -> float:
    """Mean of exp(-d^2 / (2 sigma^2)) over all pairs of rows, (N, E) and (M, E)."""
    total = 0.0
    for rows, columns in _tiles(one, other):  # the kernel is all but constant here, and float32 has no digits left
        total += torch.exp(squared_distances(rows, columns) / (-2 * SIGMA**2)).sum().item()
    return total / (len(one) * len(other))


@dataclass(frozen=True)
class Coverage:
    """What two sets of pictures share, by the balls that reach from each feature to its k-th nearest of its set."""

    precision: float
    """Share of drawn pictures in the ball of any photograph."""
    recall: float
    """Share of photographs in the ball of any drawn picture."""
    density: float
    """Balls of photographs that a drawn picture lies in, as a share of k; above 1 where they lie close."""
    coverage: float
    """Share of photographs whose ball holds a drawn picture."""


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> Coverage:
    """Precision and recall, Kynkäänniemi et al. (1904.06991), equations 1 and 2; density and coverage, Naeem et al.
    (2002.09797), equations 2 and 3. Features (N, D) and (M, D), each more than k.
    """
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)  # (N,), (M,), squared
    covered, recalled, precise = (torch.zeros(len(x), dtype=torch.bool) for x in (real, real, fake))
    dense = 0
    for i, rows in enumerate(real.split(BLOCK)):
        here = slice(i * BLOCK, (i + 1) * BLOCK)
        for j, columns in enumerate(fake.split(BLOCK)):
            there = slice(j * BLOCK, (j + 1) * BLOCK)
            distances = squared_distances(rows.double(), columns.double())  # (BLOCK, BLOCK)
            inside = distances <= real_radii[here, None]
            precise[there] |= inside.any(dim=0)
            dense += int(inside.sum())
            covered[here] |= inside.any(dim=1)
            recalled[here] |= (distances <= fake_radii[there]).any(dim=1)
    precision, recall, coverage = (hits.double().mean().item() for hits in (precise, recalled, covered))
    return Coverage(precision, recall, dense / (k * len(fake)), coverage)


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance of each feature to the k-th nearest of the others (N,)."""
    assert len(features) > k
    found = []
    for i, rows in enumerate(features.split(BLOCK)):
        nearest = torch.full((len(rows), k), torch.inf, dtype=torch.double)
        for j, columns in enumerate(features.split(BLOCK)):
            distances = squared_distances(rows.double(), columns.double())  # (BLOCK, BLOCK)
            if i == j:
                distances.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, distances], dim=1).topk(k, dim=1, largest=False).values
        found.append(nearest[:, -1])
    return torch.cat(found)


def squared_distances(one: Tensor, other: Tensor) -> Tensor:
    """Squared Euclidean distances of all pairs of rows, (N, D) and (M, D) -> (N, M)."""
    return (one.square().sum(dim=1)[:, None] + other.square().sum(dim=1) - 2 * one @ other.T).clamp(min=0)
