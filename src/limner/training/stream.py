"""The endless stream of training examples: the k-th one is a function of (seed, k) and nothing else.

Resuming at any image, another number of workers or of processes therefore changes nothing.
Source: EDM2's training loop, where randomness is a function of seed and images seen (Karras et al. 2024,
arXiv 2312.02696).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Example = dict[str, Any]


class Stream(Dataset[Example]):
    """Position k of the stream shows the picture at place k mod n of the epoch's own shuffle, with noise of its own."""

    def __init__(
        self, length: int, seed: int, example: Callable[[int, np.random.Generator], Example], *, multiple: int = 1
    ) -> None:
        """`multiple`: an epoch ends at a multiple of it, so that no batch of that size has a picture twice."""
        self.length = length
        self.epoch = length // multiple * multiple
        self.seed = seed
        self.example = example

    def __getitem__(self, position: int) -> Example:
        epoch, place = divmod(position, self.epoch)
        index = int(_shuffle(self.length, self.seed, epoch)[place])
        return self.example(index, np.random.default_rng([self.seed, position]))

    def batches(
        self, first: int, last: int, batch_size: int, *, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Generator[dict[str, Tensor], None, None]:
        """Batches of the positions first..last, this process's share of each; the last may run past `last`."""
        starts = range(first, last, batch_size)
        shares = (list(range(start + rank, start + batch_size, world)) for start in starts)
        # Forked workers share the examples' memory, and end when their parent is killed.
        context = "fork" if workers and sys.platform == "linux" else None
        yield from DataLoader(self, batch_sampler=shares, num_workers=workers, multiprocessing_context=context)


@lru_cache(maxsize=2)
def _shuffle(length: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    # A third word keeps these streams apart from those of the examples.
    return np.random.default_rng([seed, epoch, 1]).permutation(length)
