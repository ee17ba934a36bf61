"""Recall@k against its definition, picture by picture, and its intervals against a plain loop."""

from __future__ import annotations

import random
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from limner.evaluation.intervals import RESAMPLES
from limner.evaluation.retrieval import KS, Ranks, caption_ranks, intervals, ranks, recall


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.sampled_from([2, 4096]))
@settings(max_examples=30)
def test_a_caption_of_several_pictures_is_one(n: int, k: int, seed: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    text, images = (normalize(torch.randn(count, 3, generator=generator), dim=1) for count in (k, n))
    text[-1] = text[0]  # other words that the judge takes for the same
    own = torch.randint(k, (n,), generator=generator)
    near = (images.double() @ text.double().T).float()
    wanted = [sum(bool(row[t] >= row[o]) for t in range(k) if t != o) for row, o in zip(near, own.tolist())]
    assert caption_ranks(text, images, own, block).tolist() == wanted
    assert caption_ranks(text * torch.nan, images, own, block).tolist() == [k - 1] * n


# ---- ranks and recall


def naive(similarity: list[list[float]], owners: list[int], count: int) -> dict[str, float]:
    """Recall@k and median rank of captions (rows) and pictures (columns): sort, look, count. A tie counts against."""
    places: dict[str, list[int]] = {"text_to_image": [], "image_to_text": []}
    for row, owner in zip(similarity, owners):
        order = sorted(range(count), key=lambda image: (-row[image], image == owner))
        places["text_to_image"].append(order.index(owner) + 1)
    for image in sorted(set(owners)):
        column = [row[image] for row in similarity]
        order = sorted(range(len(owners)), key=lambda text: (-column[text], owners[text] == image))
        places["image_to_text"].append([owners[text] == image for text in order].index(True) + 1)
    return {
        **{f"{way}_r@{k}": sum(p <= k for p in found) / len(found) for way, found in places.items() for k in KS},
        **{f"{way}_median_rank": median(found) for way, found in places.items()},
    }


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[float]], list[int], int]:
    """Similarities with many ties, for pictures with up to four captions each, in any order."""
    captions = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any))
    owners = draw(st.permutations([image for image, own in enumerate(captions) for _ in range(own)]))
    values = st.integers(-3, 3).map(lambda n: n / 4)
    row = st.lists(values, min_size=len(captions), max_size=len(captions))
    return draw(st.lists(row, min_size=len(owners), max_size=len(owners))), list(owners), len(captions)


@given(tables(), st.integers(1, 30))
def test_recall_is_what_a_naive_loop_finds(table: tuple[list[list[float]], list[int], int], block: int) -> None:
    similarity, owners, count = table
    # Pictures along the axes, so that the features of a caption are its similarities.
    found = ranks(torch.tensor(similarity), torch.eye(count), torch.tensor(owners), block)
    assert recall(found) == pytest.approx(naive(similarity, owners, count))


def features(count: int, seed: int, width: int = 64) -> Tensor:
    """Random directions (count, width)."""
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32), st.integers(1, 50))
def test_the_block_size_changes_nothing(captions: int, pictures: int, seed: int, block: int) -> None:
    """With features of full precision, every one of which is there several times over."""
    choose = torch.Generator().manual_seed(seed)
    owners, copies = (torch.randint(pictures, (count,), generator=choose) for count in (captions, captions))
    images = features(pictures // 3 + 1, seed)[torch.randint(pictures // 3 + 1, (pictures,), generator=choose)]
    text = normalize(images[copies] + 0.1 * features(captions // 3 + 1, seed + 1)[torch.arange(captions) // 3], dim=1)
    one, other = ranks(text, images, owners, block), ranks(text, images, owners)
    assert torch.equal(one.text, other.text)
    assert torch.equal(one.images, other.images)


def test_a_copy_of_the_right_picture_ties_whatever_the_shapes() -> None:
    images = features(301, 0, width=515).repeat(2, 1)
    text = normalize(images + 0.3 * features(602, 1, width=515), dim=1)
    for block in (31, 100, 4096):
        found = ranks(text, images, torch.arange(602), block)
        assert (found.text >= 1).all()
        assert recall(found)["text_to_image_r@1"] == 0.0
        assert recall(found)["text_to_image_r@5"] == 1.0


def test_features_that_agree_are_all_found() -> None:
    images = features(50, 0)
    owners = torch.arange(50).repeat_interleave(5)
    assert set(recall(ranks(images[owners], images, owners)).values()) == {1.0}


def test_features_that_know_nothing_are_found_by_chance() -> None:
    count, per = 200, 5
    owners = torch.arange(count).repeat_interleave(per)
    figures = recall(ranks(features(count * per, 0), features(count, 1), owners))
    for k in (1, 5, 10):
        assert abs(figures[f"text_to_image_r@{k}"] - k / count) < 0.015
        assert abs(figures[f"image_to_text_r@{k}"] - (1 - (1 - 1 / count) ** k)) < 0.05
    assert abs(figures["text_to_image_median_rank"] - count / 2) < 15


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan])
def test_features_that_are_all_the_same_find_nothing(value: float) -> None:
    """What a collapsed or broken network answers is no perfect score."""
    owners = torch.arange(20).repeat_interleave(2)
    found = ranks(torch.full((40, 4), value), torch.full((20, 4), value), owners)
    assert {figure for name, figure in recall(found).items() if "@" in name} == {0.0}
    assert recall(found)["text_to_image_median_rank"] == 20
    assert recall(found)["image_to_text_median_rank"] == 39


def test_a_picture_without_captions_is_a_wrong_answer_and_no_question() -> None:
    images = torch.eye(3)
    text = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.8, 0.6]])  # the second is nearest to picture 1, and belongs to 2
    found = ranks(text, images, torch.tensor([0, 2]))
    assert found.text.tolist() == [0, 1]
    assert recall(found)["text_to_image_r@1"] == 0.5
    assert recall(found)["image_to_text_r@1"] == 1.0


# ---- intervals


def test_intervals_are_those_of_a_plain_loop_with_the_same_draws() -> None:
    rng = random.Random(0)
    owners = [n for n in range(13) for _ in range(rng.randrange(4)) if n != 5]
    rng.shuffle(owners)
    text, images = ([rng.randrange(12) for _ in range(count)] for count in (len(owners), 13))
    own = sorted(set(owners))
    shares: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(RESAMPLES):
        drawn = [own[n] for n in torch.randint(len(own), (len(own),), generator=generator)]
        asked = [rank for picture in drawn for rank, owner in zip(text, owners) if owner == picture]
        for k in KS:
            for way, answers in (("text_to_image", asked), ("image_to_text", [images[n] for n in drawn])):
                shares.setdefault(f"{way}_r@{k}", []).append(sum(rank < k for rank in answers) / len(answers))
    given = Ranks(*map(torch.tensor, (text, images, owners)))
    found, figures = intervals(given), recall(given)
    assert set(found) == set(shares)
    for name, values in shares.items():
        assert (found[name].low, found[name].high) == pytest.approx(np.quantile(values, [0.025, 0.975])), name
        assert found[name].value == figures[name]
        assert found[name].count == len(own)
