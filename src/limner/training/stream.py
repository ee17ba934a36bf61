"""The endless stream of training examples: the k-th one is a function of (seed, k) and nothing else.

Resuming at any image, another number of workers or of processes therefore changes nothing.
Source: EDM2's training loop, where randomness is a function of seed and images seen (Karras et al. 2024,
arXiv 2312.02696).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from limner.errors import UserError

Example = dict[str, Any]
Indices = np.ndarray[Any, np.dtype[np.int64]]


class Stream(Dataset[Example]):
    """Position k of the stream shows the picture at place k mod n of the epoch's own shuffle, with noise of its own."""

    def __init__(
        self,
        length: int,
        seed: int,
        example: Callable[[int, np.random.Generator], Example],
        *,
        multiple: int = 1,
        groups: Indices | None = None,
    ) -> None:
        """`multiple`: an epoch ends at a multiple of it, so that no batch of that size has a picture twice.

        `groups` (length,) tells the group of each picture, such as those of one size: then no batch of that size mixes
        groups, and an epoch leaves out what does not fill the last batch of each, always others. A group of less than a
        batch is therefore never shown.
        """
        self.length = length
        self.seed = seed
        self.example = example
        self.multiple = multiple
        self.groups = groups
        counts = np.array([length]) if groups is None else np.bincount(groups)
        self.largest = int(counts.max())
        self.epoch = int((counts // multiple).sum()) * multiple
        self._order: tuple[int, Indices] | None = None  # the last epoch that was asked for

    def __getitem__(self, position: int) -> Example:
        epoch, place = divmod(position, self.epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._shuffled(epoch)
        return self.example(int(self._order[1][place]), np.random.default_rng([self.seed, position]))

    def _shuffled(self, epoch: int) -> Indices:
        """The order of an epoch."""
        rng = np.random.default_rng([self.seed, epoch, 1])  # a third word: apart from the streams of the examples
        order = rng.permutation(self.length)
        if self.groups is None:
            return order
        size, of = self.multiple, self.groups[order]
        own = [order[of == group] for group in np.unique(of)]
        batches = np.concatenate([indices[: len(indices) // size * size].reshape(-1, size) for indices in own])
        return rng.permutation(batches).ravel()

    def of(self, multiple: int) -> Stream:
        """The same examples for batches of another size, where groups make that a difference."""
        if self.groups is None:
            return self
        return Stream(self.length, self.seed, self.example, multiple=multiple, groups=self.groups)

    def batches(
        self, first: int, last: int, batch_size: int, *, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Generator[dict[str, Tensor], None, None]:
        """Batches of the positions first..last, this process's share of each; the last may run past `last`."""
        starts = range(first, last, batch_size)
        shares = (list(range(start + rank, start + batch_size, world)) for start in starts)
        # Forked workers share the examples' memory, and end when their parent is killed.
        context = "fork" if workers and sys.platform == "linux" else None
        loader = DataLoader(
            self,
            batch_sampler=shares,
            num_workers=workers,
            multiprocessing_context=context,
            pin_memory=torch.cuda.is_available(),  # from where a GPU takes them while it computes
        )
        try:
            yield from loader
        except UserError as error:  # of a worker, before whose sentence PyTorch puts its traceback
            kind = type(error)
            raise kind(str(error).rpartition(f"{kind.__name__}: ")[2].strip()) from None
