"""The stream of examples: its k-th example is a function of seed and k, however it is read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limner.errors import DataError
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


@pytest.mark.parametrize("workers", [0, 1])
def test_what_an_example_can_t_be_read_for_is_one_sentence(workers: int) -> None:
    def example(index: int, _: np.random.Generator) -> Any:
        raise DataError(f"dog {index}.jpg can't be read (it is gone).")

    with pytest.raises(DataError) as caught:
        list(Stream(1, 0, example).batches(0, 1, 1, workers=workers))
    assert str(caught.value) == "dog 0.jpg can't be read (it is gone)."


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


# ---- batches without repeats

sizes = st.integers(1, 30).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length)))


def unique(length: int, batch_size: int, seed: int) -> Stream:
    """A stream whose batches of that size have no picture twice."""
    return Stream(length, seed, example, multiple=batch_size)


@given(sizes, st.integers(0, 99), st.integers(1, 4))
def test_no_batch_has_a_picture_twice_and_no_epoch_either(size: tuple[int, int], seed: int, epochs: int) -> None:
    length, batch_size = size
    made = unique(length, batch_size, seed)
    a_epoch = length // batch_size
    batches = [batch["index"].tolist() for batch in made.batches(0, epochs * a_epoch * batch_size, batch_size)]
    assert all(len(set(batch)) == batch_size for batch in batches)
    assert all(0 <= index < length for batch in batches for index in batch)
    for epoch in range(epochs):  # of which it leaves out less than a batch
        shown = [index for batch in batches[epoch * a_epoch : (epoch + 1) * a_epoch] for index in batch]
        assert len(set(shown)) == len(shown) == length - length % batch_size


@given(sizes, st.integers(0, 20), st.integers(0, 9))
def test_resuming_between_batches_changes_nothing(size: tuple[int, int], first: int, seed: int) -> None:
    length, batch_size = size
    last = (first + 3) * batch_size
    whole = list(unique(length, batch_size, seed).batches(0, last, batch_size))
    rest = list(unique(length, batch_size, seed).batches(first * batch_size, last, batch_size))
    assert len(rest) == 3
    for one, other in zip(rest, whole[first:], strict=True):
        assert torch.equal(one["index"], other["index"])
        assert torch.equal(one["noise"], other["noise"])


def test_what_an_epoch_leaves_out_is_always_another() -> None:
    made = unique(7, 4, 0)
    shown = Counter(made[k]["index"] for k in range(300 * 4))
    share, spread = 4 / 7, (4 / 7 * 3 / 7) ** 0.5
    assert all(abs(shown[index] - 300 * share) < 4 * spread * 300**0.5 for index in range(7))


# ---- batches of one group


def grouped(groups: list[int], batch_size: int, seed: int = 0) -> Stream:
    """A stream whose batches of that size are each of one group."""
    return Stream(len(groups), seed, example, multiple=batch_size, groups=np.array(groups))


@st.composite
def groupings(draw: st.DrawFn) -> tuple[list[int], int]:
    """The group of each picture, and a batch size that at least one of the groups fills."""
    batch_size = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(0, 15), min_size=1, max_size=4).filter(lambda own: max(own) >= batch_size))
    return draw(st.permutations([group for group, count in enumerate(counts) for _ in range(count)])), batch_size


@given(groupings(), st.integers(0, 99))
def test_each_batch_is_of_one_group_and_an_epoch_shows_as_much_of_each_as_fills_batches(
    grouping: tuple[list[int], int], seed: int
) -> None:
    groups, batch_size = grouping
    made = grouped(groups, batch_size, seed)
    wanted = {group: count // batch_size * batch_size for group, count in Counter(groups).items()}
    assert made.epoch == sum(wanted.values())
    assert made.largest == max(Counter(groups).values())
    batches = [batch["index"].tolist() for batch in made.batches(0, 3 * made.epoch, batch_size)]
    assert all(len({groups[index] for index in batch}) == 1 for batch in batches)
    per = made.epoch // batch_size
    for epoch in range(3):
        shown = [index for batch in batches[epoch * per : (epoch + 1) * per] for index in batch]
        assert len(set(shown)) == len(shown), "no picture twice"
        assert Counter(groups[index] for index in shown) == +Counter(wanted)


@given(groupings(), st.integers(0, 12), st.integers(0, 9))
def test_examples_of_groups_do_not_depend_on_where_reading_begins(
    grouping: tuple[list[int], int], first: int, seed: int
) -> None:
    groups, size = grouping
    last = (first + 3) * size
    whole = [grouped(groups, size, seed)[k] for k in range(last)]
    rest = [e for b in grouped(groups, size, seed).batches(first * size, last, size) for e in b["noise"].tolist()]
    assert rest == [e["noise"].tolist() for e in whole[first * size :]]


def test_the_order_of_batches_within_groups_and_what_is_left_out_differ_by_epoch_and_seed() -> None:
    groups = [0] * 13 + [1] * 14
    made = [grouped(groups, 4, seed) for seed in range(3)]
    orders = [tuple(own[e * own.epoch + k]["index"] for k in range(own.epoch)) for own in made for e in range(3)]
    assert len(set(orders)) == 9
    assert len({frozenset(order) for order in orders}) == 9, "others are left out"
    assert len({tuple(groups[i] for i in order) for order in orders}) > 3, "groups take turns differently"
    assert len({frozenset(frozenset(order[k : k + 4]) for k in range(0, 24, 4)) for order in orders}) == 9
    shown = Counter(made[0][k]["index"] for k in range(300 * made[0].epoch))
    for group, size in ((0, 13), (1, 14)):
        share, spread = 12 / size, (12 / size * (1 - 12 / size)) ** 0.5
        own = [shown[i] for i in range(27) if groups[i] == group]
        assert all(abs(count - 300 * share) < 5 * spread * 300**0.5 for count in own)


def test_workers_and_processes_see_the_same_groups() -> None:
    groups = [0] * 9 + [1] * 8
    whole = [batch["noise"] for batch in grouped(groups, 4).batches(8, 40, 4)]
    assert [b.tolist() for b in whole] == [b["noise"].tolist() for b in grouped(groups, 4).batches(8, 40, 4, workers=2)]
    shares = [list(grouped(groups, 4).batches(8, 40, 4, rank=rank, world=2)) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert torch.equal(torch.stack([share[number]["noise"] for share in shares], 1).flatten(0, 1), batch)


def test_a_stream_of_another_batch_size_keeps_pictures_and_groups() -> None:
    other = grouped([0] * 9 + [1] * 6, 2, seed=3).of(5)
    for batch in other.batches(0, 2 * other.epoch, 5):
        assert len({int(index) < 9 for index in batch["index"]}) == 1
    plain = stream()
    assert plain.of(99) is plain
