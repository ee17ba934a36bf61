"""The latent cache: what the U-Net trains on, memory-mapped, so that no VAE or text encoder is held while it does.

C/{train,val}/moments.npy     (N, V, 2C, h, w) float16: V views of each picture, a mirrored one after its original
C/{train,val}/masks.npy       (N, V, 1, h, w) float16: what of them counts, 0 to 1; only where a picture has a mask
C/train/features.npy          (N, V, W, s, s) float16: what an image tower sees in them; only where asked for
C/{train,val}/states.npy      (M, L, D) float16: token states of all captions, those of a picture in a row
C/{train,val}/captions.json   N lists of captions
C/empty.npy                   (1, L, D) float16: token states of the empty prompt

With aspect-ratio buckets a split has a `moments-WxH.npy`, and perhaps the others, for each size in pixels, and
`buckets.json` says by that name which pictures, counted from 0, the rows are of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from limner.artifacts import atomic_file, identity, is_finished, read_json, write_json
from limner.config import EncodeConfig
from limner.data.dataset import Split, split_identity
from limner.errors import DataError
from limner.models import adapter as adapters
from limner.models import loading
from limner.models import vae as vaes
from limner.settings import resolve

Array = np.ndarray[Any, np.dtype[np.float16]]
Kind = Literal["moments", "masks", "features"]
ENCODED: tuple[Split, ...] = ("train", "val")  # test only reports


def dataset_parents(folder: Path) -> dict[str, str]:
    """The sha256 of what is encoded of a dataset, by role, for the manifest of a cache."""
    splits = [split for split in ENCODED if (folder / split / "metadata.jsonl").is_file()]
    return {f"data/{split}": split_identity(folder, split) for split in splits}


def encoder_parents(config: EncodeConfig) -> dict[str, str]:
    """The sha256 of what encodes it, by role, for the manifest of a cache. Raises ModelError."""
    parents = {"vae": vaes.encoder_identity(config.vae), "clip": loading.text_identity(config.clip)}
    if (adapter := adapters.find(config.clip)) is not None:
        parents["adapter"] = identity(adapter)
    if config.features is not None:
        parents["features"] = loading.identity(config.features, "clip")
    return parents


def settings_of(folder: Path) -> EncodeConfig:
    """What a cache was encoded with. Raises DataError where that has changed since; the dataset may be gone.

    Raises ConfigError where another version wrote it.
    """
    settings = resolve(EncodeConfig, read_json(folder / "config.json"))
    parents = read_json(folder / "manifest.json")["parents"]
    data = dataset_parents(settings.data) if (settings.data / "dataset.json").is_file() else parents
    now = {**data, **encoder_parents(settings)}
    if changed := sorted(role for role in {**parents, **now} if parents.get(role) != now.get(role)):
        named = {"vae": f"the VAE {settings.vae}", "clip": f"the text encoder {settings.clip}"}
        named |= {"adapter": f"the adapter of {settings.clip}", "features": f"the CLIP {settings.features}"}
        what = " and ".join(named.get(role, f"{role} of {settings.data}") for role in changed)
        raise DataError(f"{folder} is stale, as {what} changed since; encode into a new folder.")
    return settings


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


def array_path(folder: Path, kind: Kind, bucket: str) -> Path:
    """Where an array of a split lies; `bucket` is empty where there are no buckets."""
    return folder / (f"{kind}-{bucket}.npy" if bucket else f"{kind}.npy")


class LatentCache:
    """One split of a cache, read on demand."""

    def __init__(self, folder: Path, split: Split) -> None:
        """Raises DataError where `folder` is no finished run of `limner encode`."""
        self._origin = folder, split
        root = folder / "cache"
        if not is_finished(folder) or not root.is_dir():
            raise DataError(f"{folder} is not a finished run of `limner encode`; run that first.")
        try:
            self._states = _mapped(root / split / "states.npy")  # (M, L, D)
            self._empty: Array = np.load(root / "empty.npy")  # (1, L, D)
            self.captions: list[list[str]] = json.loads((root / split / "captions.json").read_text(encoding="utf-8"))
            self._first_row = np.cumsum([0, *map(len, self.captions)])
            self._open_buckets(root / split)
        except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
            raise DataError(f"The latent cache in {folder} is damaged ({error}); encode into a new folder.") from None

    def _open_buckets(self, folder: Path) -> None:
        listed, count = folder / "buckets.json", len(self.captions)
        rows: dict[str, list[int]] = json.loads(listed.read_text()) if listed.exists() else {"": list(range(count))}
        _agree(sorted(index for own in rows.values() for index in own) == list(range(count)))
        _agree(self._first_row[-1] == len(self._states))
        self.bucket = np.zeros(count, np.int64)  # of each picture
        self._row = np.zeros(count, np.int64)  # of each picture, in its bucket
        self._moments: list[Array] = []  # (N, V, 2C, h, w) each
        self._masks: list[Array | None] = []  # (N, V, 1, h, w) each
        self._features: list[Array | None] = []  # (N, V, W, s, s) each
        for number, (name, own) in enumerate(rows.items()):
            self._moments.append(_mapped(array_path(folder, "moments", name)))
            self._masks.append(_mapped_if_there(array_path(folder, "masks", name)))
            self._features.append(_mapped_if_there(array_path(folder, "features", name)))
            arrays = self._moments[-1], self._masks[-1], self._features[-1]
            _agree(all(len(array) == len(own) for array in arrays if array is not None))
            self.bucket[own], self._row[own] = number, np.arange(len(own))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself, where it would be sent all that is in them."""
        return LatentCache, self._origin

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def views(self) -> int:
        """Views stored of each picture, mirrored ones among them."""
        return int(self._moments[0].shape[1])

    def captioned(self, most: int) -> list[int]:
        """The numbers of the first pictures that have captions."""
        return [index for index, captions in enumerate(self.captions) if captions][:most]

    def view(self, index: int, view: int) -> Tensor:
        """Moments of one view of a picture -> (2C, h, w) float32; h and w are those of all pictures of its bucket."""
        return _tensor(self._moments[self.bucket[index]][self._row[index], view])

    def mask(self, index: int, view: int) -> Tensor | None:
        """What of a view counts, 0 to 1 -> (1, h, w) float32; None where no picture of its bucket has a mask."""
        masks = self._masks[self.bucket[index]]
        return None if masks is None else _tensor(masks[self._row[index], view])

    def features(self, index: int, view: int) -> Tensor:
        """What the image tower of `limner encode` saw in a view -> (W, s, s) float32. Raises DataError without one."""
        features = self._features[self.bucket[index]]
        if features is None:
            raise DataError(f"{self._origin[0]} has no features to align with; encode with --set features=CLIP.")
        return _tensor(features[self._row[index], view])

    def shown(self, index: int, view: int) -> dict[str, Tensor]:
        """What an example has of a view: its `moments`, and its `mask` where there is one."""
        mask = self.mask(index, view)
        return {"moments": self.view(index, view)} | ({} if mask is None else {"mask": mask})

    def states(self, index: int, caption: int | None) -> Tensor:
        """Token states of one of a picture's captions, or of the empty prompt for None -> (L, D) float32."""
        return _tensor(self._empty[0] if caption is None else self._states[self._first_row[index] + caption])


def _agree(whole: bool) -> None:
    if not whole:
        raise ValueError("its parts differ in length")


def _mapped(path: Path) -> Array:
    return np.load(path, mmap_mode="r")


def _mapped_if_there(path: Path) -> Array | None:
    return _mapped(path) if path.exists() else None


def _tensor(row: Array) -> Tensor:
    return torch.from_numpy(np.asarray(row, np.float32))
