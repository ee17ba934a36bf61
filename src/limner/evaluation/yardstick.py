"""What pictures are judged with: a network that sees pictures, and a space that pictures and captions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from limner.data.pictures import centre_box, to_pixels
from limner.errors import ConfigError, ModelError
from limner.evaluation.copies import BLOCK, SIDE, thumbnails
from limner.evaluation.extractors import FILTER, Extractor, Reader, clip_extractor
from limner.evaluation.features import caption_features
from limner.evaluation.judge import WEIGHTS, load_judge
from limner.models import loading
from limner.models.clip import Clip

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 64
BF16 = 2.0**-7  # what storing a weight in bf16 may change it by, as a share


@dataclass(frozen=True)
class Thumbnails:
    """Pictures as their own features, so small that only layout and colours are left."""

    name: str = f"{SIDE}x{SIDE} pixels"
    sha256: str = "none"
    size: int = SIDE
    filter: str = FILTER

    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, size, size) -> (N, 3 size^2)."""
        return thumbnails(pixels, self.size)


@dataclass(frozen=True)
class ClipReader:
    """The text tower of a CLIP, whose features have unit length."""

    name: str
    sha256: str
    clip: Clip

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """One or more captions -> features of unit length (M, E), on CPU."""
        return caption_features(self.clip, captions, BATCH)


@dataclass(frozen=True)
class Yardstick:
    """A judge by its parts."""

    name: str
    sha256: str
    extractor: Extractor
    """The network whose features fidelity and copies are measured by."""
    embed: Callable[[Tensor], Tensor]
    """From those features (N, D) to features of unit length (N, E) that captions share."""
    reader: Reader
    """The network that reads captions."""
    embed_text: Callable[[Tensor], Tensor]
    """From its features (M, C) to features of unit length (M, E)."""
    clip: Clip | None = None
    """Where the judge is a CLIP."""

    @classmethod
    def find(cls, ref: str) -> Self:
        """The judge of a folder of recipes/judge.py, or the CLIP that `ref` means. Raises ModelError."""
        if (Path(ref) / WEIGHTS).is_file():
            with loading.quiet():
                judge = load_judge(Path(ref))
            heads = judge.heads
            return cls(
                judge.name, judge.sha256, judge.photographs, _still(heads.image), judge.sentences, _still(heads.text)
            )
        clip = loading.load_clip(ref)
        clip.network.to("cuda" if torch.cuda.is_available() else "cpu")
        return cls.of(ref, clip)

    @classmethod
    def of(cls, ref: str, clip: Clip) -> Self:
        """The CLIP that `ref` means, which is loaded already. Raises ModelError."""
        name = Path(ref).name if Path(ref).is_dir() else ref
        sha256 = loading.identity(ref, "clip")
        tower = clip_extractor(name, clip, sha256)
        reader = ClipReader(f"clip:{name}", sha256, clip)
        return cls(f"the CLIP of {name}", sha256, tower, _as_it_is, reader, _as_it_is, clip)

    def look(self, pictures: Sequence[Image]) -> Tensor:
        """Pictures in memory -> features of unit length (N, E), as `embed` gives them of files."""
        size = (self.extractor.size,) * 2
        seen = torch.stack([to_pixels(picture, centre_box(picture, size), size) for picture in pictures])
        return self.embed(torch.cat([self.extractor.image_features(part) for part in seen.split(BATCH)]))

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """One or more captions -> features of unit length (M, E)."""
        return self.embed_text(self.reader.text_features(captions))

    def conditions(self, model: str) -> bool:
        """Whether the judge's text tower is the one that a model reads its prompts with, in whatever precision.

        Raises ModelError where the model's can't be read.
        """
        if self.clip is None:
            return False
        encoder, _ = loading.load_text_encoder(model)
        mine, its = self.clip.network.text_model.state_dict(), encoder.state_dict()
        shared = [(mine[name].float().cpu(), its[name].float()) for name in mine.keys() & its.keys()]
        return bool(shared) and all(
            one.shape == other.shape and torch.allclose(one, other, rtol=BF16, atol=1e-6) for one, other in shared
        )

    def facts(self) -> dict[str, Any]:
        """What must be told beside every figure, ready for JSON."""
        return {"name": self.name, "sha256": self.sha256, "network": extractor_facts(self.extractor)}


def extractor_facts(seen: Extractor) -> dict[str, Any]:
    """What must be told beside every figure of its features, ready for JSON."""
    return {"name": seen.name, "sha256": seen.sha256, "size": seen.size, "filter": seen.filter}


def _still(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """A head that is not trained any more."""

    @torch.no_grad()
    def embed(features: Tensor) -> Tensor:
        return torch.cat([head(part) for part in features.split(BLOCK)])

    return embed


def _as_it_is(features: Tensor) -> Tensor:
    return features


def refuse_conditioning(yardstick: Yardstick, models: Sequence[str], *, allowed: bool) -> set[str]:
    """The models that the judge conditions. Raises ConfigError where there are some and that is not allowed."""
    conditioned = set()
    for model in models:
        try:
            if yardstick.conditions(model):
                conditioned.add(model)
        except ModelError:  # a pipeline of other parts, which no CLIP alone conditions
            continue
    if conditioned and not allowed:
        raise ConfigError(
            f"The judge is the very CLIP that {min(conditioned)} reads its prompts with, which flatters it; name "
            "another --judge, or allow this one by --set allow_conditioning_judge=true, which the report will say."
        )
    return conditioned
