"""Mixes of two CLIPs, and the choice among them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limner.errors import ModelError
from limner.evaluation.mixing import ALPHAS, choose, mixed
from limner.evaluation.retrieval import Ranks, mean_recall, recall
from limner.models.clip import Clip, new_tokenizer
from tiny import CAPTIONS, VOCABULARY, tiny_clip

NORMALISATION = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def clip_of(network: Any, size: int = VOCABULARY) -> Clip:
    """A network with a tokenizer of `size` entries."""
    return Clip(network, new_tokenizer(CAPTIONS, size), NORMALISATION)


@pytest.fixture(scope="module")
def base() -> Clip:
    """A tiny CLIP."""
    return clip_of(tiny_clip(0))


@pytest.fixture(scope="module")
def tuned(base: Clip) -> Clip:
    """The same, with all its weights changed."""
    other, network = tiny_clip(1).state_dict(), copy.deepcopy(base.network)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            value.add_(0.5 * other[name] + 0.01)
    return clip_of(network)


def bits(clip: Clip) -> dict[str, bytes]:
    """Every weight, to the bit: 0 is not -0."""
    return {name: value.numpy().tobytes() for name, value in clip.network.state_dict().items()}


# ---- weights


def test_both_ends_are_exact(base: Clip, tuned: Clip) -> None:
    one, other = (clip_of(copy.deepcopy(clip.network)) for clip in (base, tuned))
    with torch.no_grad():  # where arithmetic is not exact
        one.network.text_projection.weight[0] = torch.tensor([-0.0, 1e30, -1.0, -3e38] * 8)
        other.network.text_projection.weight[0] = torch.tensor([1.0, 1.0, -0.0, 3e38] * 8)
    assert bits(mixed(one, other, 0)) == bits(one)
    assert bits(mixed(one, other, 1)) == bits(other)


@given(st.floats(0, 1))
@settings(max_examples=10)
def test_every_weight_lies_between(base: Clip, tuned: Clip, alpha: float) -> None:
    old, new = base.network.state_dict(), tuned.network.state_dict()
    mix = mixed(base, tuned, alpha).network.state_dict()
    assert mix.keys() == old.keys()
    assert "logit_scale" in mix
    for name, value in mix.items():
        wanted = (1 - alpha) * old[name].double() + alpha * new[name].double()
        assert torch.allclose(value.double(), wanted, atol=1e-6), name


def test_mixing_changes_neither_and_the_mix_shares_nothing_with_them(base: Clip, tuned: Clip) -> None:
    before = bits(base), bits(tuned)
    for alpha in (0, 0.5, 1):
        mix = mixed(base, tuned, alpha)
        with torch.no_grad():
            for value in mix.network.state_dict().values():
                value.zero_()
    assert (bits(base), bits(tuned)) == before


def test_the_mix_is_ready_to_be_measured(base: Clip, tuned: Clip) -> None:
    training = clip_of(copy.deepcopy(tuned.network).train())
    assert not mixed(base, training, 0.5).network.training
    assert training.network.training


def test_what_is_no_float_and_the_type_are_the_tuned_ones(base: Clip, tuned: Clip) -> None:
    one, other = (clip_of(copy.deepcopy(clip.network)) for clip in (base, tuned))
    for clip, value in ((one, 1), (other, 5)):
        clip.network.register_buffer("counted", torch.tensor(value))
    one.network.double()
    for alpha in (0, 0.4, 1):
        network = mixed(one, other, alpha).network
        assert network.counted == 5
        assert {value.dtype for value in network.parameters()} == {torch.float32}


def test_other_vocabularies_are_refused(base: Clip) -> None:
    with pytest.raises(ModelError, match="vocabularies"):
        mixed(base, clip_of(base.network, VOCABULARY - 10), 0.5)


def test_other_shapes_and_other_classes_are_refused(base: Clip, siglip: Clip) -> None:
    narrow = copy.deepcopy(base.network)
    narrow.text_projection = torch.nn.Linear(32, 8, bias=False)
    with pytest.raises(ModelError, match=r"other shapes \(text_projection.weight\)"):
        mixed(base, clip_of(narrow), 0.5)
    other, longer = clip_of(siglip.network), copy.deepcopy(base.network)
    longer.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
    for pair in ((base, other), (other, base), (base, clip_of(longer)), (clip_of(longer), base)):
        with pytest.raises(ModelError, match="other shapes"):
            mixed(*pair, 1)


# ---- mean recall, which is chosen by


@st.composite
def rankings(draw: st.DrawFn) -> Ranks:
    """Ranks of a few pictures, some of which have no caption."""
    counts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any))
    owners = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    places = st.integers(0, 14)
    text, images = (draw(st.lists(places, min_size=n, max_size=n)) for n in (len(owners), len(counts)))
    return Ranks(torch.tensor(text), torch.tensor(images), owners)


@given(rankings())
def test_the_mean_recall_is_the_mean_of_the_six(found: Ranks) -> None:
    six = [value for name, value in recall(found).items() if "_r@" in name]
    assert len(six) == 6
    assert mean_recall(found)["value"] == pytest.approx(sum(six) / 6)


def random_ranks(pictures: int, captions: Sequence[int], seed: int) -> Ranks:
    """Ranks of so many pictures, which have captions in turn; those of one picture are alike."""
    rng = np.random.default_rng(seed)
    counts = [captions[i % len(captions)] for i in range(pictures)]
    hard = rng.exponential(8, pictures)
    owners = np.repeat(np.arange(pictures), counts)
    text, images = (np.floor(rng.exponential(1, len(scale)) * scale) for scale in (hard[owners], hard))
    return Ranks(*(torch.from_numpy(part).long() for part in (text, images, owners)))


@pytest.mark.parametrize("captions", [(5,), (1, 2, 9), (0, 3)])
def test_the_standard_error_is_that_of_resampled_pictures(captions: Sequence[int]) -> None:
    found = random_ranks(80, captions, 0)
    text, images, owners = found.text.numpy(), found.images.numpy(), found.owners.numpy()
    mine = {picture: text[owners == picture] for picture in np.unique(owners)}
    rng, values = np.random.default_rng(1), []
    for _ in range(600):
        drawn = rng.choice(list(mine), len(mine))
        ways = np.concatenate([mine[picture] for picture in drawn]), images[drawn]
        values.append(np.mean([(rank < k).mean() for rank in ways for k in (1, 5, 10)]))
    assert mean_recall(found)["standard_error"] == pytest.approx(np.std(values), rel=0.1)


def test_the_standard_error_falls_with_the_root_of_the_number_of_pictures() -> None:
    found = random_ranks(50, (2, 3), 0)
    four = Ranks(
        found.text.repeat(4), found.images.repeat(4), torch.cat([found.owners + 50 * times for times in range(4)])
    )
    assert mean_recall(four)["standard_error"] == pytest.approx(mean_recall(found)["standard_error"] / 2)
    assert mean_recall(four)["value"] == pytest.approx(mean_recall(found)["value"])


# ---- the choice


def row(
    alpha: float, value: float, error: float, cosine: float | None, penultimate: float | None = 1.0
) -> dict[str, Any]:
    """What `choose` looks at."""
    return {
        "alpha": alpha,
        "mean_recall": {"value": value, "standard_error": error},
        "drift": {"last": cosine, "penultimate": penultimate},
    }


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([row(0, 0.50, 0.01, 1.0), row(0.5, 0.60, 0.01, 0.95), row(1, 0.70, 0.01, 0.92)], 1),
        ([row(0, 0.50, 0.01, 1.0), row(0.5, 0.60, 0.01, 0.95), row(1, 0.70, 0.01, 0.80)], 0.5),  # too far
        ([row(0, 0.50, 0.01, 1.0), row(0.5, 0.60, 0.01, 0.95), row(1, 0.70, 0.01, 0.92, 0.80)], 0.5),  # in one layer
        ([row(0, 0.50, 0.01, 1.0), row(0.5, 0.60, 0.01, 0.95), row(1, 0.609, 0.01, 0.92)], 0.5),  # no better
        ([row(0, 0.50, 0.01, 1.0), row(0.5, 0.60, 0.10, 0.95), row(1, 0.62, 0.01, 0.92)], 1),  # the best one's error
        ([row(0, 0.50, 0.01, 1.0), row(0.5, 0.60, 0.01, 0.95), row(1, 0.62, 0.10, 0.92)], 0.5),
        ([row(0, 0.50, 0.01, 1.0), row(0.5, 0.60, 0.01, 0.85), row(1, 0.62, 0.01, 0.82)], 0),  # all too far
        ([row(0, 0.50, 0.01, 0.8), row(0.5, 0.40, 0.01, 0.95), row(1, 0.30, 0.01, 0.92)], 0),  # worse than the base
        ([row(0, 0.50, 0.01, 1.0), row(0.5, 0.00, 0.01, None), row(1, 0.00, 0.00, None)], 0),  # NaN
        ([row(1, 0.70, 0.01, 0.9), row(0.5, 0.70, 0.30, 0.9), row(0, 0.5, 0, 1.0)], 0),  # the smaller of two best
        ([row(0, 0.50, 0.00, 1.0), row(0.5, 0.70, 0.00, 0.9), row(1, 0.70, 0.00, 0.9)], 0.5),
    ],
)
def test_the_choice(rows: list[dict[str, Any]], wanted: float) -> None:
    assert choose(rows, 0.9) == wanted


SHARE, COSINE = st.floats(0, 1), st.floats(-1, 1)


@given(st.lists(st.tuples(SHARE, SHARE, COSINE | st.none()), min_size=11, max_size=11), COSINE)
def test_nothing_nearer_to_the_base_would_do(figures: list[tuple[float, float, float | None]], least: float) -> None:
    rows = [row(alpha, *figure) for alpha, figure in zip(ALPHAS, figures)]
    able = [
        (alpha, value, error)
        for alpha, (value, error, cosine) in zip(ALPHAS, figures)
        if alpha == 0 or (cosine is not None and not cosine < least)
    ]
    _, best, error = next(one for one in able if one[1] == max(value for _, value, _ in able))
    assert choose(rows, least) == next(alpha for alpha, value, _ in able if value >= best - error)


def test_the_shares_of_a_sweep() -> None:
    assert ALPHAS == (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
