"""The figures of one contender, each with its interval, and of two contenders on the same prompts and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from limner.evaluation import attributes, distances
from limner.evaluation.agreement import clip_score, distinct, r_precision
from limner.evaluation.copies import BLOCK, Copies, Nearest, copies, nearest
from limner.evaluation.extractors import Extractor, features_of
from limner.evaluation.intervals import (
    LEVEL,
    Difference,
    Interval,
    mean_interval,
    paired_difference,
    paired_set_difference,
    set_intervals,
)
from limner.evaluation.retrieval import KS, caption_ranks
from limner.evaluation.yardstick import Thumbnails, Yardstick

Figures = dict[str, Interval]
LEAST = 8  # pictures for the k nearest neighbours of a half of them
BY_FEATURES, BY_PIXELS = "copies_by_features", "copies_by_pixels"

DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "frechet": distances.frechet_of,
    "kernel_distance": distances.kernel_distance,
}
RESTS = {**DISTANCES, "kernel_distance": distances.kernel_rest}
"""The same without what is of the photographs alone, to be compared."""
SHARED = {"precision": 1.0, "recall": 1.0, "density": math.inf, "coverage": 1.0}
"""What two sets share, and the most that it can be."""


@dataclass(frozen=True)
class Seen:
    """What the judge sees in a contender's pictures."""

    features: Tensor
    """(N, D), of the judge's network."""
    images: Tensor
    """(N, E), of unit length."""
    values: Mapping[str, Tensor]
    """Figures that are means, by picture (N,)."""
    keys: Sequence[tuple[str, int]]
    """What each picture was drawn for."""


def look(
    yardstick: Yardstick,
    paths: Sequence[Path],
    captions: Sequence[str],
    keys: Sequence[tuple[str, int]],
    rivals: Sequence[str] = (),
    **how: Any,
) -> Seen:
    """See pictures beside their captions; `how` are batch_size and cache of `features_of`.

    A picture's own caption is sought among others of these and of `rivals`, as `watch.Watch` does. Raises
    DataError where a picture can't be read or gives no numbers.
    """
    features = features_of(yardstick.extractor, paths, **how)
    images = yardstick.embed(features)
    texts, own = distinct([*captions, *rivals])
    text, own = yardstick.text_features(texts), own[: len(captions)]  # (K, E), (N,)
    found = caption_ranks(text, images, own, block=BLOCK)  # (N,)
    values = {
        "r_precision": r_precision(images, text, own),
        "clip_score": clip_score(text[own], images),
        **{f"caption_r@{k}": (found < k).double() for k in KS},
    }
    return Seen(features, images, values, keys)


def alignment(seen: Seen) -> Figures:
    """R-precision, CLIPScore, and how often a picture's own caption is among the k nearest of all."""
    return {
        name: share(values) if name != "clip_score" else mean_interval(values) for name, values in seen.values.items()
    }


def share(hits: Tensor, owners: Tensor | None = None) -> Interval:
    """Share of hits (M,) of 0 to 1; `owners` (M,) as for `mean_interval`.

    A bootstrap of all or none knows nothing of what is rare; there the interval is that of Clopper and Pearson (1934).
    """
    if 0 < hits.mean() < 1:
        return mean_interval(hits, owners)
    count = len(hits) if owners is None else len(owners.unique())
    rare = 1 - ((1 - LEVEL) / 2) ** (1 / count)
    low, high = (0.0, rare) if hits.mean() == 0 else (1 - rare, 1.0)
    return Interval(hits.mean().item(), low, high, count)


def fidelity(real: Tensor, fake: Tensor) -> Figures:
    """Distances from photographs, and what the two sets share, by features (N, D) and (M, D) of one extractor."""
    enough = min(len(real), len(fake)) >= LEAST

    def measure(some: Tensor, others: Tensor) -> dict[str, float]:
        found = {name: statistic(some, others) for name, statistic in DISTANCES.items()}
        return found | (vars(distances.precision_recall(some, others)) if enough else {})

    return {name: _possible(name, one) for name, one in set_intervals(measure, real, fake).items()}


def _possible(name: str, interval: Interval) -> Interval:
    """The interval without what no share can be."""
    if name not in SHARED:
        return interval
    return replace(interval, low=max(interval.low, 0.0), high=min(interval.high, SHARED[name]))


def cmmd(real: Tensor, fake: Tensor) -> Figures:
    """CMMD by the features that captions share, (N, E) and (M, E), which are of unit length as it wants them."""
    return set_intervals(lambda some, others: {"cmmd": distances.cmmd(some, others)}, real, fake)


@dataclass(frozen=True)
class Training:
    """The training photographs that pictures may be copies of, seen in one way, and how near test ones come."""

    paths: Sequence[Path]
    features: Tensor
    """(M, D)."""
    mirrored: Tensor | None
    """(M, D), of the photographs mirrored; None where a mirrored picture has all but the same features."""
    real: Nearest

    @classmethod
    def see(cls, extractor: Extractor, paths: Sequence[Path], real: Sequence[Path], **how: Any) -> Self:
        """See training photographs and the real test ones. Raises DataError."""
        features = torch.cat(list(_comparable(extractor, paths, **how)))
        mirrored = None
        if isinstance(extractor, Thumbnails):
            mirrored = features.unflatten(1, (3, extractor.size, extractor.size)).flip(-1).flatten(1)
        near = nearest(_comparable(extractor, real, **how), features, mirrored)
        return cls(paths, features, mirrored, near)

    def baseline(self) -> dict[str, float]:
        """The threshold, ready for JSON; how many real test photographs it is from, and which share would be copies."""
        own = copies(self.real, self.real)
        return {"threshold": own.threshold, "photographs": len(own.flagged), "share": own.share}

    def judge(self, extractor: Extractor, pictures: Sequence[Path], **how: Any) -> tuple[Copies, Nearest]:
        """Which pictures are copies, and the nearest training photograph of each. Raises DataError."""
        found = nearest(_comparable(extractor, pictures, **how), self.features, self.mirrored)
        return copies(found, self.real), found


def _comparable(extractor: Extractor, paths: Sequence[Path], **how: Any) -> Iterator[Tensor]:
    """Pixels as they are; of a network's features only the direction, as their length tells of contrast; in parts."""
    for part in features_of(extractor, paths, **how).split(BLOCK):
        yield part if isinstance(extractor, Thumbnails) else normalize(part, dim=1)  # (BLOCK, D)


def sensitivity(yardstick: Yardstick, paths: Sequence[Path], **how: Any) -> Figures:
    """Share of pairs in which the judge prefers the right caption, by aspect and over all; a picture is in several.

    `paths`: S pictures of each of `attributes.PROMPTS`, prompt by prompt. Raises DataError.
    """
    features = yardstick.embed(features_of(yardstick.extractor, paths, **how))
    images = features.unflatten(0, (len(attributes.PROMPTS), -1))  # (P, S, E)
    hits = attributes.preferred(images, yardstick.text_features(attributes.CAPTIONS))
    owners = attributes.owners(images.shape[1])
    hits, owners = ({**each, "all": torch.cat(list(each.values()))} for each in (hits, owners))
    return {name: share(values, owners[name]) for name, values in hits.items()}


def compare(real: Seen, one: Seen, other: Seen) -> dict[str, Difference]:
    """The first's figures less the second's, over the prompts that both have pictures for; none where those are few."""
    place = {key: number for number, key in enumerate(other.keys)}
    pairs = [(number, place[key]) for number, key in enumerate(one.keys) if key in place]
    if len(pairs) < LEAST:
        return {}
    mine, its = (torch.tensor(rows) for rows in zip(*pairs))
    found = {name: paired_difference(one.values[name][mine], other.values[name][its]) for name in one.values}
    for name, statistic in RESTS.items():
        found[name] = paired_set_difference(statistic, real.features, one.features[mine], other.features[its])
    found["cmmd"] = paired_set_difference(distances.cmmd_rest, real.images, one.images[mine], other.images[its])
    return found


def as_json(figures: Mapping[str, Interval | Difference]) -> dict[str, dict[str, float]]:
    """Figures as metrics.json has them."""
    return {name: asdict(figure) for name, figure in figures.items()}
