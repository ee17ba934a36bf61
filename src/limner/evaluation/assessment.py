"""Photographs and a judge, before which one contender after another comes; and what was found of each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.data.dataset import Record
from limner.evaluation import scores
from limner.evaluation.contenders import LEAST, PHOTOGRAPHS, Contender, photographs
from limner.evaluation.copies import Copies, Nearest
from limner.evaluation.extractors import Extractor, features_of
from limner.evaluation.intervals import Difference
from limner.evaluation.scores import Figures, Seen, Training
from limner.evaluation.yardstick import Thumbnails, Yardstick

FURTHER = "fidelity by "  # and a network's name: the section of its figures
PAIRS = 6  # of a picture and the training photograph that it is nearest to, kept for each way of comparing


@dataclass(frozen=True)
class Pair:
    """A picture and the training photograph that is nearest to it."""

    picture: Path
    photograph: Path
    distance: float
    is_copy: bool


@dataclass
class Result:
    """What was found of a contender."""

    contender: Contender
    figures: dict[str, Figures] = field(default_factory=dict)
    """By section and name."""
    seen: Seen | None = None
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    """The nearest pairs, by how they were compared."""
    conditioned: bool = False
    """Whether the judge is the CLIP that it reads its prompts with."""


class Assessment:
    """Real photographs with their captions, and what scores pictures beside them."""

    def __init__(
        self,
        split: Sequence[Record],
        n: int | None,
        train: Sequence[Path],
        yardstick: Yardstick | None,
        further: Sequence[Extractor] = (),
        *,
        copies: bool,
        batch_size: int,
        cache: Path,
    ) -> None:
        """See the first `n` captioned photographs of a split, and training photographs: all of them where `copies` of
        them are looked for.

        Captions have rivals in the whole split, and how near its photographs come to training is what copies are known
        by. Fidelity is measured by the features of the yardstick's network, and by those of `further` ones. Raises
        DataError where a photograph can't be read.
        """
        self.yardstick = yardstick
        self.how: dict[str, Any] = {"batch_size": batch_size, "cache": cache}
        real = photographs(split, n)
        self.rivals = [record.captions[0] for record in photographs(split, None)]
        self.photographs = Result(Contender(PHOTOGRAPHS, real, {}))
        self.real = [record.path for record in real]
        self.split, self.train = [record.path for record in split], train
        self.further = {extractor: features_of(extractor, self.real, **self.how) for extractor in further}
        if yardstick is not None:
            self._see(self.photographs, yardstick)
        self.looked_for: dict[str, Extractor] = {}
        if copies and train:
            known = {} if yardstick is None else {scores.BY_FEATURES: yardstick.extractor}
            self.looked_for = {**known, scores.BY_PIXELS: Thumbnails()}
        for extractor in self.looked_for.values():
            features_of(extractor, train, **self.how)  # is kept; what can't be read is told now
            features_of(extractor, self.split, **self.how)
        if len(train) >= LEAST:
            self._floor()

    @functools.cached_property
    def ways(self) -> dict[str, tuple[Extractor, Training]]:
        """How copies are looked for; too large to be there while pictures are drawn, whose memory is measured."""
        return {
            name: (extractor, Training.see(extractor, self.train, self.split, **self.how))
            for name, extractor in self.looked_for.items()
        }

    def _see(self, result: Result, yardstick: Yardstick) -> Seen:
        one = result.contender
        paths = [record.path for record in one.records]
        result.seen = scores.look(yardstick, paths, one.captions, one.keys, self.rivals, **self.how)
        result.figures["alignment"] = scores.alignment(result.seen)
        return result.seen

    def _floor(self) -> None:
        """What as many training photographs reach, or all where there are fewer; they are real but others."""
        drawn = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))[: len(self.real)].tolist()
        some = [self.train[row] for row in drawn]
        if self.yardstick is not None:
            extractor = self.yardstick.extractor
            if self.looked_for:  # which has seen all of them
                features = features_of(extractor, self.train, **self.how)[drawn]
            else:
                features = features_of(extractor, some, **self.how)
            self.photographs.figures["fidelity"] = self._fidelity(features, self.yardstick.embed(features))
        self.photographs.figures |= self._further(some)

    def _fidelity(self, features: Tensor, images: Tensor) -> Figures:
        real = self.photographs.seen
        assert real is not None
        return scores.fidelity(real.features, features) | scores.cmmd(real.images, images)

    def _further(self, paths: Sequence[Path]) -> dict[str, Figures]:
        return {
            FURTHER + extractor.name: scores.fidelity(real, features_of(extractor, paths, **self.how))
            for extractor, real in self.further.items()
        }

    def judge(self, contender: Contender) -> Result:
        """All figures of the contender's pictures. Raises DataError where the judge gets no numbers from one."""
        result = Result(contender)
        if self.yardstick is not None:
            seen = self._see(result, self.yardstick)
            result.figures["fidelity"] = self._fidelity(seen.features, seen.images)
        result.figures |= self._further([record.path for record in contender.records])
        if self.looked_for:
            result.figures["copies"] = self._copies(result)
        return result

    def _copies(self, result: Result) -> Figures:
        paths = [record.path for record in result.contender.records]
        figures = {}
        for name, (extractor, training) in self.ways.items():
            found, near = training.judge(extractor, paths, **self.how)
            figures[name] = scores.share(found.flagged.double())
            result.pairs[name] = _pairs(paths, training.paths, found, near)
        return figures

    def compare(self, one: Result, other: Result) -> dict[str, Difference]:
        """The first's figures less the second's on the same prompts; none without a judge."""
        real = self.photographs.seen
        if real is None or one.seen is None or other.seen is None:
            return {}
        return scores.compare(real, one.seen, other.seen)


def _pairs(pictures: Sequence[Path], photographs: Sequence[Path], found: Copies, near: Nearest) -> list[Pair]:
    return [
        Pair(pictures[row], photographs[int(near.owners[row])], near.distances[row].item(), bool(found.flagged[row]))
        for row in near.distances.argsort(stable=True)[:PAIRS].tolist()
    ]
