"""What a teacher says of pictures and captions, to be learned beside the pairs (distillation).

A teacher is whatever brings pictures and captions into one space: a CLIP, or a folder of recipes/judge.py. It is asked
once, about whole pictures and single captions, and the training only looks up what it said; so it may be far larger
than its pupil. It can speak of pictures without captions and of captions without pictures too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn.functional import normalize

from limner.artifacts import sha256
from limner.config import TrainClipConfig
from limner.data.dataset import Record, read_training_split, split_identity
from limner.errors import DataError
from limner.evaluation.extractors import features_of, text_features_of
from limner.evaluation.features import captions_of
from limner.evaluation.yardstick import Yardstick
from limner.training.processes import on_main

FEATURES = "features"  # folder beside the run, where the teacher's answers are kept for other runs too


@dataclass(frozen=True)
class Lessons:
    """Pictures and captions, those of the pairs first, and where the teacher puts them."""

    paths: Sequence[Path]
    captions: Sequence[str]
    pictures: Tensor
    """(N, T), of unit length."""
    texts: Tensor
    """(M, T), of unit length."""
    first: Sequence[int]
    """Which of the captions is each pair's first."""
    unpaired: tuple[int, int] | None
    """Where there are further ones: from which picture and which caption on they are shown without their own."""
    parents: dict[str, str]
    """The sha256 of the teacher and of what is further shown."""

    @classmethod
    def of(cls, config: TrainClipConfig, records: Sequence[Record], *, planned: bool) -> Self:
        """Ask the teacher, or read what was kept of its answers beside the run.

        `planned`: write nothing, and let random answers stand for its own. Raises DataError or ModelError.
        """
        assert config.teacher is not None
        teacher = Yardstick.find(config.teacher)
        parents = {"teacher": teacher.sha256}
        own = [record.path for record in records]
        captions, _ = captions_of(records)
        extra: list[Path] = []
        if config.extra is not None:
            extra = [record.path for record in read_training_split(config.extra, captioned=False)]
            parents["extra"] = split_identity(config.extra, "train")
        sayings: list[str] = []
        if config.extra_captions is not None:
            sayings = captions_in(config.extra_captions)
            parents["extra_captions"] = sha256(config.extra_captions)
        paths, texts = [*own, *extra], [*captions, *sayings]

        def ask() -> tuple[Tensor, Tensor]:
            cache = config.out.parent / FEATURES
            seen = [features_of(teacher.extractor, some, cache=cache) for some in (own, extra) if some]
            read = text_features_of(teacher.reader, texts, cache=cache)
            return teacher.embed(torch.cat(seen)), teacher.embed_text(read)

        def keep() -> None:
            """One process asks; then all read what was kept."""
            ask()

        if planned:
            width = teacher.text_features(texts[:1]).shape[1]
            seen, read = (normalize(torch.randn(len(some), width), dim=1) for some in (paths, texts))
        else:
            on_main(PartialState(), keep)
            seen, read = ask()
        unpaired = (len(own) if extra else 0, len(captions) if sayings else 0) if extra or sayings else None
        first = [0, *accumulate(len(record.captions) for record in records)]
        return cls(paths, texts, seen, read, first, unpaired, parents)

    def of_pair(self, picture: int, numbers: Sequence[int]) -> dict[str, Tensor]:
        """What is said of a pair with these of the picture's captions; joined ones are taken to stand between them."""
        read = self.texts[[self.first[picture] + number for number in numbers]]
        return {"seen": self.pictures[picture], "read": normalize(read.mean(dim=0), dim=0)}

    def draw(self, rng: np.random.Generator) -> tuple[Path, str, dict[str, Tensor]]:
        """A picture and a caption that do not belong together, and what is said of them."""
        assert self.unpaired is not None
        picture, caption = rng.integers(self.unpaired, (len(self.paths), len(self.captions)))
        lesson = {"seen": self.pictures[picture], "read": self.texts[caption]}
        return self.paths[picture], self.captions[caption], lesson


def captions_in(file: Path) -> list[str]:
    """The captions of a text file, one a line. Raises DataError where it can't be read, or has none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} can't be read ({error}); name a text file with one caption a line.") from None
    if not (captions := [line.strip() for line in lines if line.strip()]):
        raise DataError(f"{file} has no captions; write one a line.")
    return captions
