"""What sees a picture as a vector: named networks behind one small protocol, and their features kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from limner.artifacts import atomic_file, sha256
from limner.data.pictures import load_pixels
from limner.errors import DataError
from limner.progress import progress

BATCH = 32


class Extractor(Protocol):
    """A network's view of pictures, and what must be told of it beside every figure that it gives."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def sha256(self) -> str:
        """Of its weights."""

    @property
    def size(self) -> int:
        """Side of the pictures that it reads, in pixels."""

    @property
    def filter(self) -> str:
        """How pictures of another size come to `size`."""

    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, size, size) in [-1, 1] -> features (N, D), on CPU."""


def batches(
    extractor: Extractor, paths: Sequence[Path], batch_size: int = BATCH, *, mirrored: bool = False
) -> Iterator[Tensor]:
    """Features of the centre squares of pictures, in their order, no more than a batch at once -> (batch, D) each.

    Raises DataError where a picture can't be read, or where its features are no numbers.
    """
    for start in range(0, len(paths), batch_size):
        some = paths[start : start + batch_size]
        pixels = torch.stack([load_pixels(path, extractor.size) for path in some])  # (batch, 3, size, size)
        features = extractor.image_features(pixels.flip(-1) if mirrored else pixels)
        if not (finite := features.isfinite().all(dim=1)).all():
            bad = some[int((~finite).int().argmax())]
            raise DataError(f"{extractor.name} sees no numbers in the picture {bad}; leave it out or judge otherwise.")
        yield features


def features_of(
    extractor: Extractor,
    paths: Sequence[Path],
    batch_size: int = BATCH,
    *,
    mirrored: bool = False,
    cache: Path | None = None,
) -> Tensor:
    """Features of one or more pictures -> (N, D) float32.

    Where there is a folder `cache` they are kept there, by the sha256 of the pictures and of the extractor, and read
    from it the next time. Raises DataError as `batches` does.
    """
    file = None if cache is None else cache / f"{_key(extractor, paths, mirrored)}.npy"
    if file is not None and file.is_file():
        return torch.from_numpy(np.load(file))
    parts = []
    with progress(f"pictures seen by {extractor.name}", len(paths)) as advance:
        for part in batches(extractor, paths, batch_size, mirrored=mirrored):
            parts.append(part.float())
            advance(len(part))
    features = torch.cat(parts)  # (N, D)
    if file is not None:
        with atomic_file(file) as partial, partial.open("wb") as out:
            np.save(out, features.numpy())
    return features


def _key(extractor: Extractor, paths: Sequence[Path], mirrored: bool) -> str:
    """One SHA-256 of what decides the features: the pictures in their order, the weights, how pictures are read."""
    how = f"{extractor.name} {extractor.sha256} {extractor.size} {extractor.filter} {mirrored}"
    return hashlib.sha256("\n".join([how, *map(sha256, paths)]).encode()).hexdigest()
