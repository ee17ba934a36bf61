"""Drift of token states: known answers, CKA against its kernel form, and real weights that are moved on purpose."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ortho_group
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from limner.config import TrainClipConfig
from limner.errors import ModelError
from limner.evaluation.drift import cka, cosine, drift
from limner.models import clip as clips
from limner.models.clip import Clip
from tiny import CAPTIONS
from trainings import config

TEXTS = [*CAPTIONS, *(f"{word} {caption}" for word in ("dog", "two", "red") for caption in CAPTIONS)]


def states(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian states (N, L, D)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def everywhere(base: Tensor) -> Tensor:
    """A mask (N, L) that leaves nothing out."""
    return torch.ones(base.shape[:2], dtype=torch.bool)


# ---- known answers


def test_the_same_states() -> None:
    base = states(20, 3, 8)
    for measure in (cosine, cka):
        assert_close(
            measure(base, base.clone(), everywhere(base)), torch.ones(3, dtype=torch.double), atol=1e-6, rtol=0
        )


def test_a_rotation_lowers_the_cosine_only() -> None:
    base = states(20, 3, 8)
    tuned = base @ torch.tensor(ortho_group.rvs(8, random_state=0), dtype=torch.float32)
    assert_close(cka(base, tuned, everywhere(base)), torch.ones(3, dtype=torch.double), atol=1e-6, rtol=0)
    assert (cosine(base, tuned, everywhere(base)) < 0.5).all()


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_a_scale_lowers_neither(scale: float) -> None:
    base = states(20, 3, 8)
    for measure in (cosine, cka):
        found = measure(base, scale * base, everywhere(base))
        assert_close(found, torch.ones(3, dtype=torch.double), atol=1e-6, rtol=0)


def test_a_shift_that_all_share_lowers_the_cosine_only() -> None:
    base = states(20, 3, 8)
    tuned = base + 5
    assert_close(cka(base, tuned, everywhere(base)), torch.ones(3, dtype=torch.double), atol=1e-6, rtol=0)
    assert (cosine(base, tuned, everywhere(base)) < 0.6).all()


def test_noise_has_nothing_in_common() -> None:
    base, tuned = states(3000, 2, 8), states(3000, 2, 8, seed=1)
    assert (cka(base, tuned, everywhere(base)) < 0.01).all()
    assert (cosine(base, tuned, everywhere(base)).abs() < 0.03).all()


# ---- naive loops


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """States before and after, somewhat alike, and how far captions of any length reach."""
    count, length, width, seed = (draw(st.integers(1, most)) for most in (9, 4, 6, 10**6))
    base = states(count, length, width, seed=seed)
    tuned = base + draw(st.sampled_from([0.1, 1.0, 10.0])) * states(count, length, width, seed=seed + 1)
    reach = torch.tensor(draw(st.lists(st.integers(1, length), min_size=count, max_size=count)))
    return base, tuned, torch.arange(length) < reach[:, None]


@given(pairs())
def test_cosine_is_what_a_naive_loop_finds(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    base, tuned, mask = pair
    wanted = []
    for place in range(mask.shape[1]):
        found = [
            float(cosine_similarity(base[n, place], tuned[n, place], dim=0)) for n in range(len(mask)) if mask[n, place]
        ]
        wanted.append(sum(found) / len(found) if found else torch.nan)
    assert_close(cosine(base, tuned, mask).tolist(), wanted, atol=1e-6, rtol=0, equal_nan=True)


@given(pairs())
def test_cka_is_hsic_of_linear_kernels(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    """Kornblith et al. 1905.00414, equations 3 and 4, with centring matrices, as the paper writes them."""
    base, tuned, mask = pair

    def hsic(one: Tensor, other: Tensor) -> Tensor:
        count = len(one)
        centring = torch.eye(count, dtype=torch.double) - 1 / count
        return torch.trace(one @ centring @ other @ centring) / (count - 1) ** 2

    for place, found in enumerate(cka(base, tuned, mask)):
        x, y = (part[mask[:, place], place].double() for part in (base, tuned))
        if len(x) < 2:
            assert found.isnan()
            continue
        one, other = x @ x.T, y @ y.T
        assert_close(found, hsic(one, other) / (hsic(one, one) * hsic(other, other)).sqrt(), atol=1e-9, rtol=1e-6)


@given(pairs())
def test_what_is_masked_does_not_count(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    base, tuned, mask = pair
    other_base, other_tuned = (part.where(mask[:, :, None], torch.nan) for part in (base, tuned))
    for measure in (cosine, cka):
        assert_close(measure(other_base, other_tuned, mask), measure(base, tuned, mask), equal_nan=True)


def test_states_that_are_all_the_same_have_no_cka() -> None:
    """What a begin token has is the same in every caption but for rounding, which has nothing to say."""
    same = states(1, 1, 8) + 1e-6 * states(30, 1, 8, seed=1)
    rich = states(30, 1, 8, seed=2)
    for base, tuned in ((same, 2 * same), (same, rich), (rich, same)):
        assert cka(base, tuned, everywhere(base)).isnan().all()
    assert cka(rich, rich + same, everywhere(rich)) > 0.999


# ---- real weights


def moved(clip: Clip, amount: float) -> Clip:
    """The same CLIP, every weight of its text tower moved at random by a share of its own spread."""
    network = copy.deepcopy(clip.network)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.text_model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(amount * noise * weight.std().nan_to_num())
    return Clip(network, clip.tokenizer, clip.normalisation)


def test_the_further_weights_move_the_further_states_drift(clip: Clip) -> None:
    found = [drift(clip, moved(clip, amount), TEXTS, 5) for amount in (0, 0.03, 0.1, 0.3, 1.0)]
    for layer in ("last", "penultimate"):
        for name in ("mean_cosine", "mean_cka"):
            figures = [report[layer][name] for report in found]
            assert figures[0] == pytest.approx(1, abs=1e-6)
            assert all(near > far for near, far in pairwise(figures)), (layer, name, figures)
            assert figures[-1] < 0.9, (layer, name, figures)


def test_the_report_is_json_by_position(clip: Clip) -> None:
    other = moved(clip, 0.3)
    report = drift(clip, other, TEXTS, 5)
    assert report == json.loads(json.dumps(report, allow_nan=False))
    assert set(report) == {"last", "penultimate"}
    with torch.no_grad():
        before, after = (c.token_states(c.tokenize(TEXTS)) for c in (clip, other))
    reach = torch.tensor([len(clip.tokenizer(text)["input_ids"]) for text in TEXTS])
    mask = torch.arange(77) < reach[:, None]  # (N, 77)
    length = int(reach.max())
    for number, layer in enumerate(("last", "penultimate")):
        similarity = cosine_similarity(before[number], after[number], dim=2)
        assert report[layer]["mean_cosine"] == pytest.approx(similarity[mask].mean().item(), abs=1e-5)
        assert report[layer]["cosine"] == pytest.approx(
            cosine(before[number], after[number], mask)[:length].tolist(), abs=1e-5
        )
        by_position = report[layer]["cka"]
        assert by_position[0] is None, "the begin token sees only itself"
        assert by_position[1:] == pytest.approx(
            cka(before[number], after[number], mask)[1:length].tolist(), abs=1e-5, nan_ok=True
        )
        counts = mask.sum(dim=0)[:length].tolist()
        known = [(value, count) for value, count in zip(by_position, counts) if value is not None]
        assert report[layer]["mean_cka"] == pytest.approx(sum(v * c for v, c in known) / sum(c for _, c in known))


def test_one_caption_has_no_cka(clip: Clip) -> None:
    report = drift(clip, moved(clip, 0.1), ["A dog."], 5)["last"]
    assert report["mean_cka"] is None
    assert set(report["cka"]) == {None}
    assert 0 < report["mean_cosine"] < 1


def test_a_broken_tuned_clip_has_no_figures(clip: Clip) -> None:
    report = drift(clip, moved(clip, torch.nan), TEXTS, 5)["last"]
    assert report["mean_cosine"] is None
    assert report["mean_cka"] is None


@pytest.mark.parametrize("kind", ["tokenizer", "width", "siglip"])
def test_clips_that_cannot_be_compared_are_refused(kind: str, clip: Clip, siglip: Clip) -> None:
    others = {
        "tokenizer": replace(clip, tokenizer=clips.new_tokenizer(CAPTIONS[:2], 600)),
        "width": clips.new(config(TrainClipConfig, Path("d"), Path("o")), CAPTIONS),
        "siglip": siglip,
    }
    with pytest.raises(ModelError, match="tokenizers or text towers' widths differ"):
        drift(clip, others[kind], TEXTS, 5)
