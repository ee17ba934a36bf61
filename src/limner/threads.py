"""Threads of this process that compute side by side, each with its share of the cores."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_counting = threading.Lock()
"""Held while torch's number of threads may be a pool's, which a thread that then asks for the first time would keep."""


def available() -> int:
    """How many threads torch computes with where nothing else is said; also right while another makes a pool."""
    with _counting:
        return torch.get_num_threads()


def pool_of(count: int, threads: int) -> ThreadPoolExecutor:
    """Threads that stay, each of which computes with so many of torch's. Those who ask at once have the same."""
    with _counting:
        return _pool_of(count, threads)


@functools.cache
def _pool_of(count: int, threads: int) -> ThreadPoolExecutor:
    pool, begun = ThreadPoolExecutor(count, "lane"), threading.Barrier(count + 1)
    before = torch.get_num_threads()

    def begin() -> None:
        torch.get_num_threads()  # a thread's first question makes it like all others
        torch.set_num_threads(threads)
        begun.wait()

    for _ in range(count):
        pool.submit(begin)
    begun.wait()
    torch.set_num_threads(before)  # of this thread and of those yet to come; those of the pool have their own by now
    return pool
