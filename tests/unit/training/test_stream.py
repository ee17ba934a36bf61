"""The stream of examples: its k-th example is a function of seed and k, however it is read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limner.training.stream import Example, Stream

LENGTH = 7


def example(index: int, rng: np.random.Generator) -> Example:
    """The picture's number, and noise."""
    return {"index": index, "noise": torch.from_numpy(rng.standard_normal(3, np.float32))}


def stream(length: int = LENGTH, seed: int = 0) -> Stream:
    """A stream over that many pictures."""
    return Stream(length, seed, example)


def read(first: int, last: int, batch_size: int, *, seed: int = 0, **how: int) -> list[tuple[float, ...]]:
    """The examples of those positions as plain numbers."""
    batches = stream(seed=seed).batches(first, last, batch_size, **how)
    return [(int(i), *noise.tolist()) for b in batches for i, noise in zip(b["index"], b["noise"], strict=True)]


@given(
    first=st.integers(0, 40),
    batches=st.integers(1, 5),
    batch_size=st.sampled_from([1, 3, 4, 8]),
    seed=st.integers(0, 9),
)
def test_examples_do_not_depend_on_where_reading_begins_or_on_batches(
    first: int, batches: int, batch_size: int, seed: int
) -> None:
    last = first + batches * batch_size
    assert read(first, last, batch_size, seed=seed) == read(0, last, 1, seed=seed)[first:]


@pytest.mark.parametrize("workers", [1, 2])
def test_examples_do_not_depend_on_workers(workers: int) -> None:
    assert read(5, 29, 4, workers=workers) == read(5, 29, 4)


@given(st.integers(1, 12), st.integers(0, 99), st.integers(0, 5))
def test_each_epoch_shows_every_picture_once(length: int, seed: int, epoch: int) -> None:
    shown = [stream(length, seed)[k]["index"] for k in range(epoch * length, (epoch + 1) * length)]
    assert sorted(shown) == list(range(length))


def test_epochs_seeds_and_visits_differ() -> None:
    orders = [tuple(stream(20, s)[e * 20 + k]["index"] for k in range(20)) for s in range(3) for e in range(3)]
    assert len(set(orders)) == 9
    noise = Counter(row[1:] for seed in range(3) for row in read(0, 10 * LENGTH, LENGTH, seed=seed))
    assert len(noise) == 3 * 10 * LENGTH, "no noise is used twice"


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 20))
def test_the_shares_of_processes_make_up_the_batch(world: int, per: int, first: int) -> None:
    batch_size, last = world * per, first + 3 * world * per
    whole = list(stream().batches(first, last, batch_size))
    shares = [list(stream().batches(first, last, batch_size, rank=rank, world=world)) for rank in range(world)]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert {len(part["index"]) for part in parts} == {per}
        together = torch.cat([part["noise"] for part in parts]).tolist()
        assert sorted(together) == sorted(batch["noise"].tolist())


def test_the_last_batch_is_whole() -> None:
    assert [len(batch["index"]) for batch in stream().batches(0, 10, 4)] == [4, 4, 4]
    assert list(stream().batches(12, 10, 4)) == []
