"""Zero-shot classification of labelled pictures: what a CLIP knew before it was tuned, and may forget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from limner.errors import DataError
from limner.evaluation.features import caption_features, picture_features
from limner.evaluation.retrieval import ranks
from limner.models.clip import Clip

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a bad photo of the {}.",
    "a good photo of a {}.",
    "a close-up photo of a {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
)
"""Of the 80 that OpenAI published for ImageNet, some that fit any photograph."""


def read_labelled(folder: Path) -> tuple[list[str], list[Path], Tensor]:
    """The classes of a folder with one folder of pictures each -> K names, N paths, labels (N,), all in sorted order.

    Underscores in names read as spaces; folders without pictures, and what begins with a dot, are left out. Raises
    DataError where there are fewer than two classes.
    """
    classes = []
    for place in sorted(folder.iterdir()) if folder.is_dir() else []:
        if place.is_dir() and not place.name.startswith("."):
            files = [p for p in sorted(place.iterdir()) if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
            classes += [(place.name.replace("_", " "), files)] if files else []
    if len(classes) < 2:
        raise DataError(
            f"{folder} has {len(classes) or 'no'} folder{'s' * (len(classes) != 1)} of pictures; "
            "name one that holds a folder of .jpg, .png or .webp files for each of at least two classes."
        )
    labels = [number for number, (_, files) in enumerate(classes) for _ in files]
    return [name for name, _ in classes], [p for _, files in classes for p in files], torch.tensor(labels)


def class_features(clip: Clip, names: Sequence[str]) -> Tensor:
    """The mean of each class name's features in `TEMPLATES`, at unit length -> (K, E), on CPU.

    Radford et al. 2103.00020, section 3.1.4.
    """
    prompts = [template.format(name) for name in names for template in TEMPLATES]
    features = caption_features(clip, prompts, batch_size=16 * len(TEMPLATES))
    return normalize(features.unflatten(0, (len(names), len(TEMPLATES))).mean(dim=1), dim=1)


def accuracy(pictures: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of pictures whose class is the nearest, and among the five nearest where there are more than five.

    pictures (N, E) and classes (K, E) features of unit length, labels (N,). Ties count against; NaN finds nothing.
    """
    rank = ranks(pictures, classes, labels).text  # (N,): wrong classes that are as near or nearer
    return {f"zero_shot_top{k}": (rank < k).double().mean().item() for k in (1, 5) if k == 1 or len(classes) > k}


def zero_shot(clip: Clip, folder: Path, batch_size: int) -> dict[str, float]:
    """`accuracy` on a labelled folder. Raises DataError as `read_labelled`, and where a picture can't be read."""
    names, paths, labels = read_labelled(folder)
    return accuracy(picture_features(clip, paths, batch_size), class_features(clip, names), labels)
