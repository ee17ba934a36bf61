"""Agreement of pictures with captions against slow and plain versions of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from limner.evaluation.agreement import clip_score, distinct, r_precision
from limner.evaluation.retrieval import caption_ranks


def features(count: int, seed: int, width: int = 6) -> Tensor:
    """Random features of unit length (count, width)."""
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_the_clip_score_counts_what_agrees() -> None:
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert clip_score(text, images).tolist() == pytest.approx([2.5, 0, 0, 1.5])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=30)
def test_r_precision_among_all_is_that_of_a_loop(n: int, k: int, seed: int) -> None:
    images, text = features(n, seed, 3), features(k, seed + 1, 3)
    own = torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))
    first = [all(image @ text[o] > image @ t for i, t in enumerate(text) if i != o) for image, o in zip(images, own)]
    assert r_precision(images, text, own).tolist() == first


@pytest.mark.parametrize("seed", range(3))
def test_r_precision_of_what_does_not_agree_is_one_in_a_hundred(seed: int) -> None:
    """20,000 draws of 1 % have a deviation of 0.07 %."""
    images, text = features(20_000, seed, 16), features(1_000, seed + 1, 16)
    own = torch.arange(20_000) % 1_000
    assert r_precision(images, text, own).mean().item() == pytest.approx(0.01, abs=0.003)


def test_shuffled_captions_lose_what_was_found() -> None:
    text = features(1_000, 0, 32)
    images, own = normalize(text + 0.2 * features(1_000, 1, 32), dim=1), torch.arange(1_000)
    shares, others, generator = [], [], torch.Generator().manual_seed(0)
    for share in (0, 0.25, 0.5, 1):
        moved = torch.randperm(1_000, generator=generator)[: int(share * 1_000)]
        shuffled = own.clone()
        shuffled[moved] = moved.roll(1)
        shares.append(r_precision(images, text, shuffled).mean().item())
        first = (caption_ranks(text, images, shuffled) < 1).double().mean().item()
        others.append((clip_score(text[shuffled], images).mean().item(), first))
    assert shares == sorted(shares, reverse=True)
    for found in zip(*others):
        assert found == tuple(sorted(found, reverse=True))
        assert found[-1] < found[0] / 4
    assert shares[0] > 0.9
    assert shares[-1] == pytest.approx(0.01, abs=0.01)


def test_rivals_of_a_picture_depend_on_its_number_and_the_seed_alone() -> None:
    images, text, own = features(300, 0), features(500, 1), torch.arange(300)
    whole = r_precision(images, text, own, candidates=5)
    assert torch.equal(r_precision(images[:7], text, own[:7], candidates=5), whole[:7])
    assert not torch.equal(r_precision(images, text, own, candidates=5, seed=1), whole)
    assert r_precision(images, text, own, candidates=1).tolist() == [1] * 300


def test_captions_as_near_as_a_pictures_own_share_the_hit() -> None:
    image, text = features(1, 0), features(2, 0)
    text = torch.stack([text[0], text[0], text[0], -text[0]])
    assert r_precision(image, text, torch.tensor([1])).tolist() == [pytest.approx(1 / 3)]
    everywhere = torch.full((5, 4), 1.0)
    assert r_precision(everywhere, everywhere, torch.arange(5)).tolist() == pytest.approx([1 / 5] * 5)


def test_features_that_are_no_numbers_find_nothing() -> None:
    assert r_precision(torch.full((5, 4), torch.nan), features(5, 0, 4), torch.arange(5)).tolist() == [0] * 5


def test_captions_of_the_same_words_are_one() -> None:
    texts, own = distinct(["a", "b", "a", "c"])
    assert texts == ["a", "b", "c"]
    assert own.tolist() == [0, 1, 0, 2]
