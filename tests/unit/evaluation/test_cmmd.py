"""Figures of drawn pictures against slow and plain versions of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from limner.data.pictures import save_grid
from limner.evaluation.cmmd import clip_score, cmmd, r_precision, score_pictures
from limner.evaluation.features import caption_features, picture_features
from limner.models.clip import Clip, new_tokenizer
from tiny import CAPTIONS, VOCABULARY, tiny_clip

NORMALISATION = {"image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 0.75]}


def features(count: int, seed: int, width: int = 6) -> Tensor:
    """Random features of unit length (count, width)."""
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture(scope="module")
def judge() -> Clip:
    """A tiny CLIP that tells captions and pictures apart."""
    network = tiny_clip()
    with torch.no_grad():
        for projection in (network.text_projection, network.visual_projection):
            projection.weight.mul_(50)
    return Clip(network, new_tokenizer(CAPTIONS, VOCABULARY), NORMALISATION)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Pictures of 16x16 pixels in [-1, 1], as many as `CAPTIONS` (8, 3, 16, 16), of bytes."""
    return torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(1)) / 127.5 - 1


def pairs(one: Tensor, other: Tensor) -> float:
    """Mean kernel of all pairs, one by one."""
    kernels = [math.exp(-sum((x - y) ** 2 for x, y in zip(a, b)) / 200) for a in one.tolist() for b in other.tolist()]
    return sum(kernels) / len(kernels)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_cmmd_is_that_of_a_loop_over_all_pairs(n: int, m: int, seed: int) -> None:
    one, other = features(n, seed), features(m, seed + 1)
    wanted = 1000 * (pairs(one, one) + pairs(other, other) - 2 * pairs(one, other))
    assert cmmd(one, other) == pytest.approx(wanted, abs=1e-6)


def test_cmmd_of_more_features_than_a_block_holds() -> None:
    """Features that are repeated tell no more than they do once."""
    one, other = features(11, 0), features(7, 1)
    assert cmmd(one.repeat(200, 1), other.repeat(301, 1)) == pytest.approx(cmmd(one, other), abs=1e-6)


def test_cmmd_of_the_same_features_is_nothing_and_grows_with_distance() -> None:
    one = features(20, 0)
    assert cmmd(one, one) == 0
    away = [cmmd(one, normalize(one + torch.tensor([far, 0, 0, 0, 0, 0]), dim=1)) for far in (0.1, 0.3, 1, 3)]
    assert away == sorted(away)
    assert away[0] > 1e-3


def test_cmmd_of_two_opposite_features_is_known() -> None:
    one = torch.tensor([[1.0, 0.0]])
    assert cmmd(one, -one) == pytest.approx(2000 * (1 - math.exp(-4 / 200)))


def test_the_clip_score_counts_what_agrees() -> None:
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert clip_score(text, images) == pytest.approx(2.5 * (1 + 0 + 0 + 0.6) / 4)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_r_precision_is_that_of_a_loop(n: int, k: int, seed: int) -> None:
    images, text = features(n, seed, 3), features(k, seed + 1, 3)
    own = torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))
    first = [all(image @ text[o] > image @ t for i, t in enumerate(text) if i != o) for image, o in zip(images, own)]
    assert r_precision(images, text, own) == pytest.approx(sum(first) / n)


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan])
def test_pictures_that_all_look_the_same_to_the_judge_are_not_precise(value: float) -> None:
    own = torch.arange(5)
    assert r_precision(torch.full((5, 4), value), torch.full((5, 4), value), own) == 0


def test_photographs_score_as_themselves(judge: Clip, pixels: Tensor, tmp_path: Path) -> None:
    """Pixels and the files that they are written to have the same features, and so no distance."""
    paths = [tmp_path / f"{number}.png" for number in range(len(pixels))]
    for picture, path in zip(pixels, paths):
        save_grid(picture[None], path, columns=1)
    real = picture_features(judge, paths, 4)
    figures = score_pictures(judge, pixels, CAPTIONS, real)
    text = caption_features(judge, CAPTIONS, 4)
    assert figures["cmmd"] == pytest.approx(0, abs=1e-7)
    assert figures["clip_score"] == pytest.approx(clip_score(text, real), abs=1e-5)
    assert figures["r_precision"] == r_precision(real, text, torch.arange(8))
    assert set(figures) == {"cmmd", "clip_score", "r_precision"}
    assert score_pictures(judge, -pixels, CAPTIONS, real)["cmmd"] > 1e-4


def test_larger_pictures_are_shrunk_as_pillow_shrinks_them(judge: Clip) -> None:
    """Which is how a CLIP's own preprocessor makes pictures fit: bicubic, antialiased."""
    blocks = torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(2)).round() * 2 - 1
    large = blocks.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)  # (4, 3, 40, 48), its edges overshoot
    large[:2] = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
    planes = [
        Image.fromarray(plane.numpy()).resize((16, 16), Image.Resampling.BICUBIC) for plane in large.flatten(0, 1)
    ]
    small = torch.stack([torch.from_numpy(np.array(plane)) for plane in planes]).unflatten(0, (4, 3)).clamp(-1, 1)
    wanted = score_pictures(judge, small, CAPTIONS[:4], features(3, 0, 16))
    assert score_pictures(judge, large, CAPTIONS[:4], features(3, 0, 16)) == pytest.approx(wanted, abs=1e-3)


def test_the_batch_does_not_change_the_figures(judge: Clip, pixels: Tensor) -> None:
    real = features(3, 0, 16)
    whole = score_pictures(judge, pixels, CAPTIONS, real)
    assert score_pictures(judge, pixels, CAPTIONS, real, batch_size=3) == pytest.approx(whole, abs=1e-4)


def test_a_caption_that_comes_twice_is_no_rival_of_itself(judge: Clip, pixels: Tensor) -> None:
    real = features(3, 0, 16)
    assert score_pictures(judge, pixels[:2], ["A dog.", "A dog."], real)["r_precision"] == 1
    captions = [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0], CAPTIONS[2]]
    text, images = caption_features(judge, captions, 4), judge.image_features(pixels[:4]).detach()
    figures = score_pictures(judge, pixels[:4], captions, real)
    assert figures["clip_score"] == pytest.approx(clip_score(text, images), abs=1e-5)
    assert figures["r_precision"] == r_precision(images, text[[0, 1, 3]], torch.tensor([0, 1, 0, 2]))
