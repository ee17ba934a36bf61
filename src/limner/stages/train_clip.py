"""`limner train clip`: text and image features of the same thing come to lie close together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from limner.artifacts import Run
from limner.config import TrainClipConfig
from limner.data.dataset import Record, read_training_split, split_identity
from limner.data.pictures import jitter, load_crop, may_flip, read_picture
from limner.errors import ConfigError, DataError, ModelError
from limner.evaluation.alignment import Judged, drawable, skipped, write_report
from limner.evaluation.retrieval import mean_recall, recall
from limner.evaluation.zeroshot import read_labelled
from limner.models import adapter, loading
from limner.models import clip as clips
from limner.models.tuning import Tuning
from limner.settings import resolve
from limner.threads import pool_of
from limner.training.contrast import Towers, gathered
from limner.training.loop import plan_training, run_training
from limner.training.losses import contrastive, missed, sigmoid
from limner.training.stream import Example, Stream
from limner.training.task import refuse_other_settings
from limner.training.teaching import Lessons

EXTRA = 0.5  # share of the examples that are no pair but a picture and a caption of which the teacher alone speaks
NO_PAIR = -1  # their owner
REPORTED = {"labelled", "sweep_alpha", "min_cosine", "unet"}  # settings of the report, also of a finished run


def run(config: TrainClipConfig) -> Path:
    """Train, or go on where the run stopped, and report what was gained. -> the run folder, with `model/clip`.

    Raises DataError, ModelError, ConfigError or RunError in one sentence.
    """
    folder = run_training(TrainClip, config)
    if PartialState().is_main_process:  # the others have nothing left to wait for
        asked = config.model_dump(include=REPORTED)
        with Run(folder).work(resolve(TrainClipConfig, asked, file=folder / "config.json")):
            write_report(folder, config)
    return folder


def plan(config: TrainClipConfig) -> dict[str, Any]:
    """What `run` would do; a few steps are timed, nothing is written."""
    facts = plan_training(partial(TrainClip, planned=True), config)
    return {**facts, "skipped": f"{sum(skipped(config.data).values()):,} pictures without a caption"}


class TrainClip:
    """The task: each picture of a batch among all captions, and each caption among all pictures."""

    def __init__(self, config: TrainClipConfig, *, planned: bool = False) -> None:
        """`planned`: nothing is written, also not what a teacher says. Raises DataError, ModelError or ConfigError."""
        self.config = config
        self.train = read_training_split(config.data, captioned=True)
        self.judged = Judged.of(config.data, "val")
        if not self.judged.records:
            raise DataError(f"{config.data} has no captioned pictures in its val split; prepare it with some.")
        if config.batch_size > len(self.train):
            raise ConfigError(
                f"batch_size {config.batch_size} is more than the {len(self.train)} captioned pictures of "
                f"{config.data}; lower it, so that no batch has a picture twice."
            )
        if config.labelled is not None:
            _refuse_unreadable(config.labelled)  # now, not after the training
        self.parents = {"data": split_identity(config.data, "train")}
        if config.model is None:
            self.clip = clips.new(config, (c for r in self.train for c in r.captions))
        else:
            self.clip = loading.load_clip(config.model)
            if adapter.find(config.model) is not None:
                raise ModelError(
                    f"{config.model} has a linear adapter beside its CLIP, which a further training would lose; "
                    "name the CLIP as it was before."
                )
            self.parents["model"] = loading.identity(config.model, "clip")
            refuse_other_settings(config, clips.settings_of(self.clip), "CLIP")
        if PartialState().is_main_process:
            captions = [caption for record in self.train for caption in record.captions]
            clips.warn_of_cut(self.clip.tokenizer, captions, self.clip.length)
        if config.patch_dropout and not self.clip.pools:
            raise ConfigError("patch_dropout is for a CLIP whose pictures are read at a class token; leave it out.")
        if config.unet is not None:
            drawable(config.unet, self.clip, config.model or "the new CLIP")
        self.towers = Towers(
            self.clip,
            chunk_size=config.chunk_size,
            biased=config.loss == "sigmoid",
            guarded=config.drift_weight > 0,
            patch_dropout=config.patch_dropout,
        )
        self.network: nn.Module = self.towers
        self.tuning = Tuning(self.clip, config)
        self.facts: dict[str, Any] = {}
        self.lessons = None
        if config.teacher is not None:
            self.lessons = Lessons.of(config, self.train, planned=planned)
            self.parents |= self.lessons.parents
        self.rates = {f"network.{name}": rate for name, rate in self.tuning.rates.items()}
        self.stream = Stream(len(self.train), config.seed, self._example, multiple=config.batch_size)

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        record, numbers = self.train[index], draw_captions(self.train[index], rng, self.config.join)
        while len(numbers) > 1 and not self.clip.reads_whole(_joined(record, numbers)):
            numbers = numbers[:-1]
        path, caption, owner = record.path, _joined(record, numbers), index
        lesson = {}
        if self.lessons is not None:
            if self.lessons.unpaired and rng.random() < EXTRA:
                path, caption, lesson, owner = *self.lessons.draw(rng), NO_PAIR
            else:
                lesson = self.lessons.of_pair(index, numbers)
        flip = self.config.flips and (owner == NO_PAIR or may_flip(caption))
        pixels = load_crop(path, self.clip.size, rng, min_scale=self.config.min_scale, flip=flip)
        if self.config.colour:
            pixels = jitter(pixels, rng, self.config.colour)
        return {"pixels": pixels, "ids": self.clip.tokenize([caption])[0], "owner": owner, **lesson}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The chosen loss over the batch of all processes, and the penalties for drift and for missing the teacher."""
        self.towers.clamp()
        text, images, moved, scale, bias = network(batch["ids"], batch["pixels"])
        text, images, owners = (gathered(rows) for rows in (text, images, batch["owner"]))
        paired = owners != NO_PAIR
        figures = {"scale": scale}
        with torch.autocast(text.device.type, enabled=False):  # bf16 has no digits for the differences of similarities
            pairs = text[paired], images[paired]
            if self.config.loss == "sigmoid":
                total = figures["aligned"] = sigmoid(*pairs, scale, bias, owners[paired])
            else:
                total = figures["aligned"] = contrastive(*pairs, scale, owners[paired])
            if self.lessons is not None:
                read, seen = gathered(batch["read"]), gathered(batch["seen"])
                figures["missed"] = missed(text, images, read, seen)
                total = total + self.config.teacher_weight * figures["missed"]
        if self.config.drift_weight:
            figures["drift"] = gathered(moved).mean()
            total = total + self.config.drift_weight * figures["drift"]
        return total, figures

    def validate(self, samples: Path) -> dict[str, float]:
        """Recall of val captions and pictures; `loss` is one minus the mean of the six recalls."""
        del samples
        found = self.judged.ranks(self.clip)
        return {"loss": 1 - mean_recall(found)["value"], **recall(found)}

    def save(self, folder: Path) -> None:
        """Write `folder/clip`, and what `Tuning.save` writes beside it."""
        self.towers.clamp()
        with loading.quiet():
            self.tuning.save(folder)


def _refuse_unreadable(folder: Path) -> None:
    """Raise DataError where a labelled folder is none, or where a picture in it can't be read."""
    _, paths, _ = read_labelled(folder)

    def look(path: Path) -> None:
        try:
            read_picture(path)
        except DataError:  # which speaks of a dataset
            raise DataError(f"The picture {path} can't be read; mend it, or take it out of {folder}.") from None

    for _ in pool_of(os.cpu_count() or 1, 1).map(look, paths):  # Pillow lets go of the interpreter
        pass


def draw_captions(record: Record, rng: np.random.Generator, join: float) -> list[int]:
    """Which of a picture's captions are shown: one, or for a share `join` of the draws two or more in any order."""
    count = len(record.captions)
    if count > 1 and rng.random() < join:
        joined = int(rng.integers(2, count + 1))
        return [int(number) for number in rng.permutation(count)[:joined]]
    return [int(rng.integers(count))]


def _joined(record: Record, numbers: Sequence[int]) -> str:
    """Some captions of a picture as one text."""
    return " ".join(record.captions[number] for number in numbers)
