"""Duplicates are those that a naive comparison of all pictures finds."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limner.data import duplicates
from limner.data.duplicates import Hashed, Pair, near_pairs, same_pixels

CLOSE_HASHES = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 3, 2**63, 2**64 - 1])
PICTURES = st.lists(st.tuples(st.sampled_from(["train", "val", "test"]), CLOSE_HASHES), max_size=12).map(
    lambda rows: [Hashed(f"{split}/{n}.jpg", "", phash) for n, (split, phash) in enumerate(rows)]
)


def naive(pictures: list[Hashed], within: int) -> set[tuple[int, frozenset[str]]]:
    """Every pair of pictures of different splits, compared bit by bit."""
    return {
        (distance, frozenset((a.file, b.file)))
        for a, b in combinations(pictures, 2)
        if a.file.split("/")[0] != b.file.split("/")[0] and (distance := bin(a.phash ^ b.phash).count("1")) <= within
    }


@given(PICTURES, st.integers(0, 64))
def test_near_pairs_are_those_of_a_naive_comparison(pictures: list[Hashed], within: int) -> None:
    count, pairs = near_pairs(pictures, within)
    assert {(pair.distance, frozenset((pair.one, pair.other))) for pair in pairs} == naive(pictures, within)
    assert count == len(pairs)
    assert pairs == sorted(pairs, key=lambda pair: pair.distance)


def test_all_pairs_are_counted_and_the_closest_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 3)
    monkeypatch.setattr(duplicates, "ROWS", 2)
    train = [Hashed(f"train/{n}", "", 2**n - 1) for n in range(5)]  # n bits from 0
    count, pairs = near_pairs([*reversed(train), Hashed("test/a", "", 0)])
    assert count == 5
    assert pairs == [Pair(n, f"train/{n}", "test/a") for n in range(3)]


def test_the_same_pixels_are_found_within_a_split_too() -> None:
    pictures = [Hashed(file, pixels, 0) for file, pixels in zip("abcde", "xyxxz")]
    assert same_pixels(pictures) == {"c": "a", "d": "a"}
    assert same_pixels([]) == {}
