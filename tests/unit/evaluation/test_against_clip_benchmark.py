"""Recall@k as the published clip_benchmark computes it from the same features, five captions a picture."""

from __future__ import annotations

import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from limner.evaluation.retrieval import KS, ranks, recall

PER = 5
THEIRS = {"text_to_image": "image_retrieval_recall", "image_to_text": "text_retrieval_recall"}


def randn(*shape: int, seed: int) -> Tensor:
    """Unit Gaussian noise in float64, so that rounding makes no ties and breaks none."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def owners_of(images: Tensor) -> Tensor:
    """Five captions for each picture -> (5N,)."""
    return torch.arange(len(images)).repeat_interleave(PER)


class Stored:
    """A model in clip_benchmark's sense whose features are known beforehand; a picture is its own feature."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def encode_image(self, images: Tensor) -> Tensor:
        """(N, E) -> (N, E)."""
        return images

    def encode_text(self, numbers: Tensor) -> Tensor:
        """Numbers of captions (M,) -> (M, E)."""
        return self.text[numbers]


def theirs(text: Tensor, images: Tensor) -> dict[str, float]:
    """What clip_benchmark finds, under our names."""
    numbers = [[str(n * PER + i) for i in range(PER)] for n in range(len(images))]
    batches = [(images[start : start + 16], numbers[start : start + 16]) for start in range(0, len(images), 16)]
    found = zeroshot_retrieval.evaluate(
        Stored(text),
        batches,
        lambda texts: torch.tensor([int(t) for t in texts]),
        "cpu",
        amp=False,
        recall_k_list=list(KS),
    )
    return {f"{way}_r@{k}": found[f"{name}@{k}"] for way, name in THEIRS.items() for k in KS}


def optimistic(text: Tensor, images: Tensor) -> dict[str, float]:
    """Recall@k where every tie counts in favour."""
    owners = owners_of(images)
    similarity = text @ images.T  # (5N, N)
    own = similarity[torch.arange(len(text)), owners]  # (5N,)
    best = own.reshape(-1, PER).amax(dim=1)  # (N,)
    places = {
        "text_to_image": (similarity > own[:, None]).sum(dim=1),
        "image_to_text": (similarity > best).sum(dim=0),
    }
    return {f"{way}_r@{k}": (place < k).double().mean().item() for way, place in places.items() for k in KS}


def ours(text: Tensor, images: Tensor) -> dict[str, float]:
    """What we find, without the medians, which clip_benchmark has not."""
    found = ranks(text.float(), images.float(), owners_of(images), block=37)
    return {name: value for name, value in recall(found).items() if "@" in name}


def agreeing(pictures: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Features of captions (5N, E) that lie near those of their pictures (N, E)."""
    images = normalize(randn(pictures, 32, seed=seed), dim=1)
    text = images[owners_of(images)] + noise * randn(PER * pictures, 32, seed=seed + 1)
    return normalize(text, dim=1), images


@pytest.mark.parametrize("seed", range(5))
def test_without_ties(seed: int) -> None:
    text, images = agreeing(90, 0.4, seed)
    found = ours(text, images)
    assert found == pytest.approx(theirs(text, images), abs=1e-6)
    assert 0.1 < found["text_to_image_r@1"] < found["image_to_text_r@10"], "or else little would be compared"


@pytest.mark.parametrize("seed", range(5))
def test_ties_away_from_the_cut(seed: int) -> None:
    """Some pictures have one caption five times; others are there twice, and lie farthest from their captions."""
    text, images = agreeing(90, 0.4, seed)
    text = text.reshape(90, PER, -1)
    text[:30] = text[:30, :1]
    axis = normalize(randn(32, seed=99), dim=0)
    images[-20:] = normalize(-axis + 0.1 * images[-20:], dim=1)
    images[-20:-10] = images[-10:]
    text[-20:] = axis + 0.3 * text[-20:]
    text = normalize(text.reshape(PER * 90, -1), dim=1)
    found = ours(text, images)
    assert found == pytest.approx(optimistic(text, images), abs=1e-6), "no tie may straddle a cut"
    assert found == pytest.approx(theirs(text, images), abs=1e-6)
    assert 0.1 < found["text_to_image_r@1"] < found["image_to_text_r@10"]


@given(st.integers(10, 20), st.integers(0, 2**32))
def test_ties_at_the_cut(pictures: int, seed: int) -> None:
    """clip_benchmark takes whichever of equals its topk meets first; ours is the least that it may find."""
    generator = torch.Generator().manual_seed(seed)
    text, images = (
        torch.randint(-1, 2, (count, 4), generator=generator).double() for count in (PER * pictures, pictures)
    )
    owners, scores = owners_of(images), text @ images.T
    right = owners[:, None] == torch.arange(pictures)  # (5N, N)
    low, high = ours(text, images), optimistic(text, images)
    for way, table, truth in (("text_to_image", scores, right), ("image_to_text", scores.T, right.T)):
        for k in KS:
            hits = zeroshot_retrieval.batchify(zeroshot_retrieval.recall_at_k, table, truth, 16, "cpu", k=k) > 0
            name = f"{way}_r@{k}"
            assert low[name] - 1e-9 <= hits.double().mean().item() <= high[name] + 1e-9, name
