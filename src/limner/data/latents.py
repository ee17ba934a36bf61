"""The latent cache: what the U-Net trains on, memory-mapped, so that no VAE or text encoder is held while it does.

C/{train,val}/moments.npy     (N, V, 2C, h, w) float16: V views of each picture, the second one mirrored
C/{train,val}/states.npy      (M, L, D) float16: token states of all captions, those of a picture in a row
C/{train,val}/captions.json   N lists of captions
C/empty.npy                   (1, L, D) float16: token states of the empty prompt
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limner.artifacts import atomic_file, is_finished, write_json
from limner.data.dataset import Split
from limner.errors import DataError

Array = np.ndarray[Any, np.dtype[np.float16]]


def write_array(path: Path, shape: Sequence[int], parts: Iterable[Tensor]) -> None:
    """Write an array piece by piece, whole or not at all. `parts` follow each other along the first dimension."""
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)),
        "fortran_order": False,
        "shape": tuple(shape),
    }
    # Not as a memory map, where a full disk would end the process without a word
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        rows = 0
        for part in parts:
            file.write(part.to("cpu", torch.float16).contiguous().numpy().tobytes())
            rows += len(part)
        assert rows == shape[0], f"{path}: {rows} rows in place of {shape[0]}"


def write_captions(path: Path, captions: Sequence[Sequence[str]]) -> None:
    """Write the captions of each picture."""
    write_json(path, [list(own) for own in captions])


class LatentCache:
    """One split of a cache, read on demand."""

    def __init__(self, folder: Path, split: Split) -> None:
        """Raises DataError where `folder` is no finished run of `limner encode`."""
        root = folder / "cache"
        if not is_finished(folder) or not root.is_dir():
            raise DataError(f"{folder} is not a finished run of `limner encode`; run that first.")
        try:
            self.moments: Array = np.load(root / split / "moments.npy", mmap_mode="r")  # (N, V, 2C, h, w)
            self._states: Array = np.load(root / split / "states.npy", mmap_mode="r")  # (M, L, D)
            self._empty: Array = np.load(root / "empty.npy")  # (1, L, D)
            self.captions: list[list[str]] = json.loads((root / split / "captions.json").read_text(encoding="utf-8"))
            self._first_row = np.cumsum([0, *map(len, self.captions)])
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise DataError(f"The latent cache in {folder} is damaged ({error}); encode into a new folder.") from None
        if (len(self.captions), self._first_row[-1]) != (len(self.moments), len(self._states)):
            raise DataError(
                f"The latent cache in {folder} is damaged (its parts differ in length); encode into a new folder."
            )

    def __len__(self) -> int:
        return len(self.moments)

    @property
    def views(self) -> int:
        """Views stored of each picture: 2 where the mirrored one is."""
        return int(self.moments.shape[1])

    def view(self, index: int, view: int) -> Tensor:
        """Moments of one view of a picture -> (2C, h, w) float32."""
        return torch.from_numpy(np.asarray(self.moments[index, view], np.float32))

    def states(self, index: int, caption: int | None) -> Tensor:
        """Token states of one of a picture's captions, or of the empty prompt for None -> (L, D) float32."""
        row = self._empty[0] if caption is None else self._states[self._first_row[index] + caption]
        return torch.from_numpy(np.asarray(row, np.float32))
