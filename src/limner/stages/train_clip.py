"""`limner train clip`: text and image features of the same thing come to lie close together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from limner.config import TrainClipConfig
from limner.data.dataset import Record, read_training_split, split_identity
from limner.data.pictures import jitter, load_crop, may_flip
from limner.errors import ConfigError, DataError
from limner.evaluation.alignment import Judged, drawable, skipped, write_report
from limner.evaluation.retrieval import mean_recall, recall
from limner.evaluation.zeroshot import read_labelled
from limner.models import clip as clips
from limner.models import loading
from limner.models.tuning import Tuning
from limner.training.contrast import Towers, gathered
from limner.training.loop import plan_training, run_training
from limner.training.losses import contrastive, sigmoid
from limner.training.stream import Example, Stream


def run(config: TrainClipConfig) -> Path:
    """Train, or go on where the run stopped, and report what was gained. -> the run folder, with `model/clip`.

    Raises DataError, ModelError, ConfigError or RunError in one sentence.
    """
    folder = run_training(TrainClip, config)
    if PartialState().is_main_process:  # the others have nothing left to wait for
        write_report(folder, config)
    return folder


def plan(config: TrainClipConfig) -> dict[str, Any]:
    """What `run` would do; a few steps are timed, nothing is written."""
    facts = plan_training(TrainClip, config)
    return {**facts, "skipped": f"{sum(skipped(config.data).values()):,} pictures without a caption"}


class TrainClip:
    """The task: each picture of a batch among all captions, and each caption among all pictures."""

    def __init__(self, config: TrainClipConfig) -> None:
        """Raises DataError, ModelError or ConfigError."""
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
            read_labelled(config.labelled)  # refused now, not after the training
        self.parents = {"data": split_identity(config.data, "train")}
        if config.model is None:
            self.clip = clips.new(config, (c for r in self.train for c in r.captions))
        else:
            self.clip = loading.load_clip(config.model)
            self.parents["model"] = loading.identity(config.model, "clip")
        if config.patch_dropout and not self.clip.pools:
            raise ConfigError("patch_dropout is for a CLIP whose pictures are read at a class token; leave it out.")
        if config.unet is not None:
            drawable(config.unet, self.clip)
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
        self.rates = {f"network.{name}": rate for name, rate in self.tuning.rates.items()}
        self.stream = Stream(len(self.train), config.seed, self._example, multiple=config.batch_size)

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        record = self.train[index]
        caption = draw_caption(record, rng, self.config.join)
        flip = may_flip(caption)
        pixels = load_crop(record.path, self.clip.size, rng, min_scale=self.config.min_scale, flip=flip)
        if self.config.colour:
            pixels = jitter(pixels, rng, self.config.colour)
        return {"pixels": pixels, "ids": self.clip.tokenize([caption])[0], "owner": index}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The chosen loss over the batch of all processes, and the penalty for drift."""
        self.towers.clamp()
        text, images, moved, scale, bias = network(batch["ids"], batch["pixels"])
        text, images, owners = (gathered(rows) for rows in (text, images, batch["owner"]))
        with torch.autocast(text.device.type, enabled=False):  # bf16 has no digits for the differences of similarities
            if self.config.loss == "sigmoid":
                aligned = sigmoid(text, images, scale, bias, owners)
            else:
                aligned = contrastive(text, images, scale, owners)
        figures = {"aligned": aligned, "scale": scale}
        if not self.config.drift_weight:
            return aligned, figures
        drift = gathered(moved).mean()
        return aligned + self.config.drift_weight * drift, figures | {"drift": drift}

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


def draw_caption(record: Record, rng: np.random.Generator, join: float) -> str:
    """One of a picture's captions, or for a share `join` of the draws two or more of them in any order, joined."""
    captions = record.captions
    if len(captions) > 1 and rng.random() < join:
        count = int(rng.integers(2, len(captions) + 1))
        return " ".join(captions[i] for i in rng.permutation(len(captions))[:count])
    return captions[rng.integers(len(captions))]
