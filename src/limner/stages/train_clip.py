"""`limner train clip`: text and image features of the same thing come to lie close together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limner.config import TrainClipConfig
from limner.data.dataset import read_split, read_training_split, split_identity
from limner.data.pictures import load_crop, load_pixels, may_flip
from limner.errors import DataError
from limner.evaluation.retrieval import recall
from limner.models import clip as clips
from limner.models import loading
from limner.training.loop import plan_training, run_training
from limner.training.losses import contrastive
from limner.training.stream import Example, Stream

MOST_SCALE = math.log(100)  # of the logarithm of the inverse temperature (Radford et al. 2103.00020, section 2.5)


def run(config: TrainClipConfig) -> Path:
    """Train, or go on where the run stopped. -> the run folder, with both towers in `model/clip`.

    Raises DataError, ModelError, ConfigError or RunError in one sentence.
    """
    return run_training(TrainClip, config)


def plan(config: TrainClipConfig) -> dict[str, Any]:
    """What `run` would do; a few steps are timed, nothing is written."""
    return plan_training(TrainClip, config)


class TrainClip:
    """The task: each picture of a batch among all captions, and each caption among all pictures."""

    def __init__(self, config: TrainClipConfig) -> None:
        """Raises DataError, ModelError or ConfigError."""
        self.config = config
        self.train = read_training_split(config.data, captioned=True)
        self.val = [record for record in read_split(config.data, "val") if record.captions]
        if not self.val:
            raise DataError(f"{config.data} has no captioned pictures in its val split; prepare it with some.")
        self.parents = {"data": split_identity(config.data, "train")}
        if config.model is None:
            self.tokenizer = clips.new_tokenizer((c for r in self.train for c in r.captions), config.vocabulary)
            self.network = clips.new(config, self.tokenizer)
            self.normalisation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        else:
            self.network, self.tokenizer = loading.load_clip(config.model)
            self.normalisation = clips.read_normalisation(loading.component(config.model, "clip"))
            self.parents["model"] = loading.identity(config.model, "clip")
        self.size = self.network.config.vision_config.image_size
        self.stream = Stream(len(self.train), config.seed, self._example)

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        record = self.train[index]
        caption = record.captions[rng.integers(len(record.captions))]
        flip = may_flip(caption)
        pixels = load_crop(record.path, self.size, rng, min_scale=self.config.min_scale, flip=flip)
        return {"pixels": pixels, "ids": clips.tokenize(self.tokenizer, caption), "owner": index}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Symmetric InfoNCE over the batch."""
        with torch.no_grad():
            self.network.logit_scale.clamp_(max=MOST_SCALE)
        out = network(
            input_ids=clips.trimmed(batch["ids"], self.tokenizer.eos_token_id),
            pixel_values=clips.normalise(batch["pixels"], self.normalisation),
        )
        scale = self.network.logit_scale.exp()
        return contrastive(out.text_embeds.float(), out.image_embeds.float(), scale, batch["owner"]), {"scale": scale}

    def validate(self, samples: Path) -> dict[str, float]:
        """Recall of val captions and pictures; `loss` is one minus the mean of the six recalls."""
        del samples
        device = next(self.network.parameters()).device
        captions = [caption for record in self.val for caption in record.captions]
        owners = torch.tensor([i for i, record in enumerate(self.val) for _ in record.captions])
        text, images = [], []
        for start in range(0, len(captions), self.config.batch_size):
            batch = captions[start : start + self.config.batch_size]
            ids = torch.stack([clips.tokenize(self.tokenizer, caption) for caption in batch]).to(device)
            text.append(self.network.get_text_features(clips.trimmed(ids, self.tokenizer.eos_token_id)).pooler_output)
        for start in range(0, len(self.val), self.config.batch_size):
            records = self.val[start : start + self.config.batch_size]
            pixels = torch.stack([load_pixels(record.path, self.size) for record in records]).to(device)
            values = clips.normalise(pixels, self.normalisation)
            images.append(self.network.get_image_features(values).pooler_output)
        text_features, image_features = (
            nn.functional.normalize(torch.cat(parts).float(), dim=1).cpu() for parts in (text, images)
        )
        figures = recall(text_features, image_features, owners)
        return {"loss": 1 - sum(figures.values()) / len(figures), **figures}

    def save(self, folder: Path) -> None:
        """Write `folder/clip`."""
        with loading.quiet():
            clips.save(self.network, self.tokenizer, self.normalisation, folder / "clip")
