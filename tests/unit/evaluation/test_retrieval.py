"""Recall@k against its definition, picture by picture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from limner.evaluation.retrieval import recall

KS = (1, 2, 5)


def naive(similarity: list[list[float]], owners: list[int], count: int) -> dict[str, float]:
    """Recall@k of captions (rows) and pictures (columns): sort, look, count. A tie counts against."""
    figures = {}
    for k in KS:
        hits = 0
        for row, owner in zip(similarity, owners):
            order = sorted(range(count), key=lambda image: (-row[image], image == owner))
            hits += owner in order[:k]
        figures[f"text_to_image_r@{k}"] = hits / len(owners)
        hits = 0
        for image in range(count):
            column = [row[image] for row in similarity]
            order = sorted(range(len(owners)), key=lambda text: (-column[text], owners[text] == image))
            hits += any(owners[text] == image for text in order[:k])
        figures[f"image_to_text_r@{k}"] = hits / count
    return figures


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[float]], list[int], int]:
    """Similarities with many ties, for pictures with one to four captions each, in any order."""
    captions = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    owners = draw(st.permutations([image for image, own in enumerate(captions) for _ in range(own)]))
    values = st.integers(-3, 3).map(lambda n: n / 4)
    row = st.lists(values, min_size=len(captions), max_size=len(captions))
    return draw(st.lists(row, min_size=len(owners), max_size=len(owners))), list(owners), len(captions)


@given(tables())
def test_recall_is_what_a_naive_loop_finds(table: tuple[list[list[float]], list[int], int]) -> None:
    similarity, owners, count = table
    # Pictures along the axes, so that the features of a caption are its similarities.
    assert recall(torch.tensor(similarity), torch.eye(count), torch.tensor(owners), KS) == pytest.approx(
        naive(similarity, owners, count)
    )


def features(count: int, seed: int, width: int = 64) -> Tensor:
    """Random directions (count, width)."""
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_features_that_agree_are_all_found() -> None:
    images = features(50, 0)
    owners = torch.arange(50).repeat_interleave(5)
    assert set(recall(images[owners], images, owners).values()) == {1.0}


def test_features_that_know_nothing_are_found_by_chance() -> None:
    count, per = 200, 5
    owners = torch.arange(count).repeat_interleave(per)
    figures = recall(features(count * per, 0), features(count, 1), owners)
    for k in (1, 5, 10):
        assert abs(figures[f"text_to_image_r@{k}"] - k / count) < 0.015
        assert abs(figures[f"image_to_text_r@{k}"] - (1 - (1 - 1 / count) ** k)) < 0.05


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan])
def test_features_that_are_all_the_same_find_nothing(value: float) -> None:
    """What a collapsed or broken network answers is no perfect score."""
    owners = torch.arange(20).repeat_interleave(2)
    figures = recall(torch.full((40, 4), value), torch.full((20, 4), value), owners)
    assert set(figures.values()) == {0.0}
