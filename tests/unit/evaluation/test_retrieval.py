"""Recall@k against its definition, picture by picture, and its intervals against simulated truth."""

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

from limner.evaluation.retrieval import Ranks, caption_ranks, intervals, ranks, recall

KS = (1, 2, 5)


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
    assert recall(found, KS) == pytest.approx(naive(similarity, owners, count))


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
        assert recall(found, (1, 2))["text_to_image_r@1"] == 0.0
        assert recall(found, (1, 2))["text_to_image_r@2"] == 1.0


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
    figures = recall(ranks(text, images, torch.tensor([0, 2])), (1, 2))
    assert figures["text_to_image_r@1"] == 0.5
    assert figures["text_to_image_r@2"] == 1.0
    assert figures["image_to_text_r@1"] == 1.0


# ---- intervals


def simulated(pictures: int, seed: int, *, per: int = 5, share: float = 0.4, agree: bool = True) -> Ranks:
    """Ranks 0 and 99, of which `share` are 0 in truth; the captions of a picture agree, or are independent."""
    rng = np.random.default_rng(seed)
    hits = np.repeat(rng.random(pictures) < share, per) if agree else rng.random(pictures * per) < share
    text, images = (torch.from_numpy(np.where(hit, 0, 99)) for hit in (hits, rng.random(pictures) < share))
    return Ranks(text, images, torch.arange(pictures).repeat_interleave(per))


def width(interval: tuple[float, float]) -> float:
    """From end to end."""
    return interval[1] - interval[0]


def test_intervals_are_those_of_a_plain_loop_with_the_same_draws() -> None:
    rng = random.Random(0)
    owners = [n for n in range(13) for _ in range(rng.randrange(4)) if n != 5]
    rng.shuffle(owners)
    text, images = ([rng.randrange(4) for _ in range(count)] for count in (len(owners), 13))
    own = sorted(set(owners))
    shares: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(3)
    for _ in range(40):
        drawn = [own[n] for n in torch.randint(len(own), (len(own),), generator=generator)]
        asked = [rank for picture in drawn for rank, owner in zip(text, owners) if owner == picture]
        for k in KS:
            for way, answers in (("text_to_image", asked), ("image_to_text", [images[n] for n in drawn])):
                shares.setdefault(f"{way}_r@{k}", []).append(sum(rank < k for rank in answers) / len(answers))
    found = intervals(Ranks(*map(torch.tensor, (text, images, owners))), KS, level=0.8, resamples=40, seed=3)
    assert set(found) == set(shares)
    for name, values in shares.items():
        assert found[name] == pytest.approx(np.quantile(values, [0.1, 0.9])), name


@pytest.mark.parametrize("agree", [True, False])
def test_intervals_hold_the_truth_as_often_as_they_say(agree: bool) -> None:
    held: dict[str, list[bool]] = {}
    for seed in range(200):
        for name, (low, high) in intervals(simulated(150, seed, agree=agree), (1,), resamples=200, seed=seed).items():
            held.setdefault(name, []).append(low <= 0.4 <= high)
    for name, cases in held.items():
        assert 0.91 < np.mean(cases) < 0.985, name


def test_intervals_shrink_with_the_root_of_the_number_of_pictures() -> None:
    few, many = (intervals(simulated(count, 0), (1,), resamples=2000) for count in (100, 1600))
    for name in few:
        assert 3.4 < width(few[name]) / width(many[name]) < 4.6, name


@pytest.mark.parametrize(("agree", "ratio"), [(True, 5**0.5), (False, 1.0)])
def test_captions_that_agree_count_as_one(agree: bool, ratio: float) -> None:
    """Drawing captions one by one, as if each had a picture of its own, would promise too much."""
    of_pictures = simulated(400, 1, agree=agree)
    alone = Ranks(of_pictures.text, of_pictures.text, torch.arange(len(of_pictures.text)))
    clustered, naively = (intervals(r, (1,), resamples=2000)["text_to_image_r@1"] for r in (of_pictures, alone))
    assert width(clustered) / width(naively) == pytest.approx(ratio, rel=0.12)


def test_intervals_surround_the_recall_and_repeat() -> None:
    found = simulated(60, 0, agree=False)
    wide, narrow = (intervals(found, level=level) for level in (0.99, 0.5))
    figures = {name: value for name, value in recall(found).items() if "@" in name}
    assert set(figures) == set(wide)
    for name, value in figures.items():
        assert wide[name][0] < narrow[name][0] <= value <= narrow[name][1] < wide[name][1], name
    assert intervals(found, resamples=50) == intervals(found, resamples=50) != intervals(found, resamples=50, seed=1)
