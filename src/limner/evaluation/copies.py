"""Whether pictures are copies of training photographs: nearer to one than photographs of other scenes ever are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from limner.evaluation.distances import squared_distances

SHARE = 0.999  # of real test photographs must be farther from training than a copy is
SIDE = 32  # of the thumbnails that are compared pixel by pixel
BLOCK = 1024  # pictures compared at once


@dataclass(frozen=True)
class Nearest:
    """The nearest training photograph of each of N pictures."""

    distances: Tensor
    """(N,), Euclidean."""
    owners: Tensor
    """(N,): the photograph's number."""


def thumbnails(pixels: Tensor, side: int = SIDE) -> Tensor:
    """Pixels of small pictures in which only layout and colours are left. (N, 3, H, W) -> (N, 3 side^2) in [-1, 1]."""
    return interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True).flatten(1)


def nearest(pictures: Iterable[Tensor], training: Tensor, mirrored: Tensor | None = None) -> Nearest:
    """The nearest of training photographs (M, D) for pictures that come in parts, (N_i, D) each.

    `mirrored` (M, D) are the same photographs mirrored, in which form a training shows them too.
    """
    ways = [training.float()] if mirrored is None else [training.float(), mirrored.float()]
    distances, owners = [], []
    for part in pictures:
        for rows in part.float().split(BLOCK):
            found = [_nearest(rows, way) for way in ways]
            best = torch.stack([distance for distance, _ in found]).min(dim=0)  # (2, N) -> (N,)
            distances.append(best.values)
            owners.append(torch.stack([owner for _, owner in found]).gather(0, best.indices[None])[0])
    return Nearest(torch.cat(distances), torch.cat(owners))


def _nearest(rows: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    owners = torch.cat([squared_distances(rows, block) for block in training.split(4 * BLOCK)], dim=1).argmin(dim=1)
    return (rows - training[owners]).norm(dim=1), owners  # anew, since a difference of squares is never quite 0


@dataclass(frozen=True)
class Copies:
    """Which pictures are nearer to training than `SHARE` of real test photographs are."""

    threshold: float
    """A copy's distance is below."""
    flagged: Tensor
    """(N,) bool."""

    @property
    def share(self) -> float:
        """Of the pictures that are copies."""
        return self.flagged.double().mean().item()


def copies(pictures: Nearest, real: Nearest) -> Copies:
    """Judge pictures by how near real test photographs come to training, measured in the same way.

    What equals a training photograph is a copy even where test photographs do, too.
    """
    threshold = real.distances.sort().values[int(len(real.distances) * (1 - SHARE) + 1e-9)].item()
    return Copies(threshold, (pictures.distances < threshold) | (pictures.distances == 0))
