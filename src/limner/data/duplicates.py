"""Pictures that are there twice: exactly, or nearly and across splits, where they would flatter a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from limner.data.dataset import SPLITS

NEAR = 6  # of 64 bits of the perceptual hash may differ; beyond, Flickr8k's pairs are mostly two scenes alike
MOST_PAIRS = 1_000  # to list; all are counted
ROWS = 256  # compared at once, for memory


@dataclass(frozen=True)
class Hashed:
    """What is compared of a picture. `file` begins with its split."""

    file: str
    pixels: str
    phash: int


@dataclass(frozen=True)
class Pair:
    """Two pictures of different splits that look alike; `distance` is the number of differing bits."""

    distance: int
    one: str
    other: str


def same_pixels(pictures: Sequence[Hashed]) -> dict[str, str]:
    """The file of each picture that equals an earlier one in every pixel -> the file of that one."""
    first: dict[str, str] = {}
    repeated = {}
    for picture in pictures:
        before = first.setdefault(picture.pixels, picture.file)
        if before != picture.file:
            repeated[picture.file] = before
    return repeated


def near_pairs(pictures: Sequence[Hashed], within: int = NEAR) -> tuple[int, list[Pair]]:
    """How many pairs of pictures of different splits look alike, and the closest of them, closest first."""
    by_split = [[p for p in pictures if p.file.startswith(f"{split}/")] for split in SPLITS]
    count = 0
    pairs: list[Pair] = []
    for some, others in combinations(by_split, 2):
        right = np.array([p.phash for p in others], dtype=np.uint64)  # (M,)
        for start in range(0, len(some), ROWS):
            left = np.array([p.phash for p in some[start : start + ROWS]], dtype=np.uint64)  # (R,)
            distances = np.bitwise_count(left[:, None] ^ right[None, :])  # (R, M)
            hits = np.argwhere(distances <= within)
            count += len(hits)
            closest = hits[np.argsort(distances[tuple(hits.T)], kind="stable")][:MOST_PAIRS]
            pairs += [Pair(int(distances[i, j]), some[start + i].file, others[j].file) for i, j in closest]
            pairs = sorted(pairs, key=lambda pair: (pair.distance, pair.one, pair.other))[:MOST_PAIRS]
    return count, pairs
