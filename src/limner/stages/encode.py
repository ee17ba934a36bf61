"""`limner encode`: VAE moments of every picture and token states of every caption, once, for all U-Net trainings."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from limner.artifacts import Run, write_json
from limner.config import EncodeConfig
from limner.data.buckets import bucket_sizes, nearest
from limner.data.dataset import Record, Split, read_training_split, read_validation_split
from limner.data.latents import Kind, array_path, dataset_parents, encoder_parents, write_array, write_captions
from limner.data.pictures import (
    Box,
    Size,
    centre_box,
    load_pixels,
    random_box,
    read_picture,
    read_shape,
    to_mask,
    to_pixels,
)
from limner.errors import ConfigError, DataError
from limner.generation.engine import encode_prompts
from limner.generation.painters import enough_memory
from limner.generation.prompts import length_of
from limner.models import adapter as adapters
from limner.models import loading
from limner.models import vae as vaes
from limner.models.clip import Clip, warn_of_cut
from limner.models.gate import TextFacts
from limner.progress import progress
from limner.threads import pool_of

TIMED = 8  # pictures by which the plan tells the time


@dataclass(frozen=True)
class Encoders:
    """What turns pictures and captions into what the U-Net sees."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    adapter: Tensor | None
    """A map (D, D) that was trained on the CLIP's token states; the U-Net is to read what it makes of them."""
    observer: Clip | None
    """Whose image tower looks at pictures, where that is asked for."""
    device: torch.device


@dataclass(frozen=True)
class Bucket:
    """Pictures of a split that are stored at one size. It has no name where `buckets` is off."""

    name: str
    size: Size
    records: dict[int, Record]
    """Its pictures by their place in the split."""
    views: int
    """Views stored of each, mirrored ones among them."""
    masked: int
    """How many of its pictures have an alpha channel."""


def run(config: EncodeConfig) -> Path:
    """Write the latent cache to `out/cache`, array by array; arrays that an earlier run finished are kept.

    -> the run folder. Raises DataError, ModelError, ConfigError or RunError in one sentence.
    """
    started = time.time()
    splits = _splits(config)
    encoders = _load(config)
    parents = dataset_parents(config.data) | encoder_parents(config)
    run = Run.open(config.out, config, parents)
    if run.finished:
        print(f"Nothing to do: {run.folder} is finished, with these encoders and settings.")
        return run.folder
    with run.work(config):
        captions = [caption for records in splits.values() for record in records for caption in record.captions]
        warn_of_cut(encoders.tokenizer, captions, length_of(encoders.text_encoder, encoders.tokenizer))
        with enough_memory(f"{config.batch_size} pictures of this size at once", "choose a smaller batch_size"):
            _write_cache(config, encoders, splits, run.folder / "cache")
        text = TextFacts.of(encoders.text_encoder.config.to_dict(), encoders.tokenizer)
        pictures = {split: len(records) for split, records in splits.items()}
        # `assemble` asks what the U-Net was trained on
        run.finish(started=started, pictures=pictures, text=asdict(text))
    print(run.folder / "cache")
    return run.folder


def _write_cache(config: EncodeConfig, encoders: Encoders, splits: dict[Split, list[Record]], cache: Path) -> None:
    for split, records in splits.items():
        buckets = _buckets(config, split, records)
        for bucket in buckets:
            _encode_pictures(config, encoders, bucket, cache / split)
            if encoders.observer is not None and split == "train":
                _encode_features(config, encoders.observer, bucket, cache / split)
        if config.buckets:
            write_json(cache / split / "buckets.json", {bucket.name: list(bucket.records) for bucket in buckets})
        write_captions(cache / split / "captions.json", [record.captions for record in records])
        captions = [caption for record in records for caption in record.captions]
        _encode_captions(config, encoders, captions, cache / split / "states.npy", f"{split} captions")
    _encode_captions(config, encoders, [""], cache / "empty.npy", "empty prompt")


def plan(config: EncodeConfig) -> dict[str, Any]:
    """What `run` would do; nothing is written."""
    splits = _splits(config)
    encoders = _load(config)
    buckets = {split: _buckets(config, split, records) for split, records in splits.items()}
    length = length_of(encoders.text_encoder, encoders.tokenizer)
    captions = sum(len(record.captions) for records in splits.values() for record in records)
    numbers = captions * length * encoders.text_encoder.config.hidden_size
    for bucket in (bucket for own in buckets.values() for bucket in own):
        numbers += math.prod(_shape(encoders, bucket, "moments"))
        numbers += math.prod(_shape(encoders, bucket, "masks")) if bucket.masked else 0
    views = {split: sum(len(bucket.records) * bucket.views for bucket in own) for split, own in buckets.items()}
    paths = [record.path for record in splits["train"][:TIMED]]
    started = time.perf_counter()
    for path in paths:
        _moments(encoders, load_pixels(path, config.size)[None])
    seconds = (time.perf_counter() - started) / len(paths) * sum(views.values())
    if (observer := encoders.observer) is not None:
        started = time.perf_counter()
        seen = [_features(observer, load_pixels(path, observer.size)[None]) for path in paths]
        seconds += (time.perf_counter() - started) / len(paths) * views["train"]
        numbers += seen[0].numel() * views["train"]
    return {
        **{split: "; ".join(_summary(encoders, bucket) for bucket in own) for split, own in buckets.items()},
        "captions": f"{captions:,}, {length} token states each",
        "disk": f"{numbers * 2 / 1e6:,.0f} MB",
        "time": f"about {seconds / 60:,.0f} minutes for the pictures on {encoders.device}",
        "out": config.out,
    }


def _splits(config: EncodeConfig) -> dict[Split, list[Record]]:
    train = read_training_split(config.data, captioned=False)
    if not any(record.captions for record in train):
        raise DataError(f"{config.data} has no caption in its train split; prepare a source that has some.")
    return {"train": train, "val": read_validation_split(config.data)}


def _buckets(config: EncodeConfig, split: Split, records: Sequence[Record]) -> list[Bucket]:
    """Which pictures of a split are stored at which size; their headers are read for it. Raises DataError."""
    sizes = bucket_sizes(config.size, config.bucket_step) if config.buckets else [(config.size, config.size)]
    placed: dict[Size, dict[int, Record]] = {size: {} for size in sizes}
    masked = dict.fromkeys(sizes, 0)
    for index, record in enumerate(records):
        shape, has_alpha = read_shape(record.path)
        size = nearest(shape, sizes)
        placed[size][index] = record
        masked[size] += has_alpha
    views = (config.views if split == "train" else 1) * (1 + config.flips)
    if not config.buckets:
        return [Bucket("", size, placed[size], views, masked[size]) for size in sizes]
    return [Bucket(f"{size[1]}x{size[0]}", size, own, views, masked[size]) for size, own in placed.items() if own]


def _summary(encoders: Encoders, bucket: Bucket) -> str:
    count, views, _, h, w = _shape(encoders, bucket, "moments")
    masked = f", {bucket.masked:,} with a mask" if bucket.masked else ""
    height, width = bucket.size
    return f"{count:,} pictures of {width}x{height} in {views} views, latents of {w}x{h}{masked}"


def _load(config: EncodeConfig) -> Encoders:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = loading.load_vae(config.vae).to(device, memory_format=torch.channels_last)
    if config.size % vaes.factor(vae.config):
        raise ConfigError(f"--size {config.size} is not divisible by the VAE's factor {vaes.factor(vae.config)}.")
    if config.buckets and config.bucket_step % vaes.factor(vae.config):
        raise ConfigError(
            f"bucket_step {config.bucket_step} is not divisible by the VAE's factor {vaes.factor(vae.config)}; "
            "choose a multiple."
        )
    text_encoder, tokenizer = loading.load_text_encoder(config.clip)
    adapter, observer = adapters.find(config.clip), None
    weight = None if adapter is None else adapters.load(adapter, text_encoder.config.hidden_size).to(device)
    if config.features is not None:
        observer = loading.load_clip(config.features)
        observer.network.to(device)
    return Encoders(vae, text_encoder.to(device), tokenizer, weight, observer, device)


@torch.no_grad()
def _moments(encoders: Encoders, pixels: Tensor) -> Tensor:
    return vaes.encode(encoders.vae, pixels.to(encoders.device))


def _shape(encoders: Encoders, bucket: Bucket, kind: Kind) -> tuple[int, ...]:
    """Of the array of a bucket: (N, V, 2C, h, w), or (N, V, 1, h, w) of masks."""
    factor, channels = vaes.factor(encoders.vae.config), int(encoders.vae.config["latent_channels"])
    depth = 2 * channels if kind == "moments" else 1
    return (len(bucket.records), bucket.views, depth, *(side // factor for side in bucket.size))


def _encode_pictures(config: EncodeConfig, encoders: Encoders, bucket: Bucket, folder: Path) -> None:
    """Write the moments of a bucket's pictures into the folder of their split, and masks where one has a mask."""

    def moments(indices: Sequence[int]) -> Tensor:
        pixels = _cut(config, bucket, indices, to_pixels, bucket.size)  # (N, V, 3, H, W)
        return _moments(encoders, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])  # (N, V, 2C, h, w)

    def masks(indices: Sequence[int]) -> Tensor:
        return _cut(config, bucket, indices, to_mask, (height, width))  # (N, V, 1, h, w)

    *_, height, width = _shape(encoders, bucket, "masks")
    arrays: dict[Kind, Callable[[Sequence[int]], Tensor]] = {"moments": moments}
    if bucket.masked:
        arrays["masks"] = masks
    for kind, encode in arrays.items():
        batches = _batched(list(bucket.records), max(1, config.batch_size // bucket.views))
        path, shape = array_path(folder, kind, bucket.name), _shape(encoders, bucket, kind)
        _write(path, shape, batches, encode, f"{folder.name} {path.stem}")


def _encode_features(config: EncodeConfig, observer: Clip, bucket: Bucket, folder: Path) -> None:
    """Write what an image tower sees in a bucket's pictures, each view squeezed to the square that it reads."""

    def features(indices: Sequence[int]) -> Tensor:
        pixels = _cut(config, bucket, indices, to_pixels, (observer.size, observer.size))  # (N, V, 3, S, S)
        return _features(observer, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])

    batches = list(_batched(list(bucket.records), max(1, config.batch_size // bucket.views)))
    shape = (len(bucket.records), *features(batches[0][:1]).shape[1:])
    path = array_path(folder, "features", bucket.name)
    _write(path, shape, iter(batches), features, f"{folder.name} {path.stem}")


@torch.no_grad()
def _features(observer: Clip, pixels: Tensor) -> Tensor:
    """Of the patches of square pictures: pixels (N, 3, S, S) -> (N, W, s, s)."""
    return observer.patch_features(pixels.to(observer.network.device))


def _cut(
    config: EncodeConfig,
    bucket: Bucket,
    indices: Sequence[int],
    cut: Callable[[Image, Box, Size], Tensor],
    size: Size,
) -> Tensor:
    """The views of some pictures, a mirrored one after its original -> (N, V, c, *size)."""

    def views(index: int) -> Iterator[Tensor]:
        picture = read_picture(bucket.records[index].path)
        for view in range(bucket.views // (1 + config.flips)):
            # By seed, picture and view, so that neither batches nor a kill change a bit of them
            rng = np.random.default_rng([config.seed, index, view])
            box = random_box(picture, bucket.size, rng, config.min_scale) if view else centre_box(picture, bucket.size)
            shown = cut(picture, box, size)
            yield from (shown, shown.flip(-1)) if config.flips else (shown,)

    pool = pool_of(os.cpu_count() or 1, 1)  # Pillow lets go of the interpreter
    return torch.stack(list(pool.map(lambda index: torch.stack(list(views(index))), indices)))


def _encode_captions(config: EncodeConfig, encoders: Encoders, captions: Sequence[str], path: Path, what: str) -> None:
    length = length_of(encoders.text_encoder, encoders.tokenizer)

    def encode(batch: Sequence[str]) -> Tensor:
        # A caption over one piece would be longer than its neighbours; training takes its first piece.
        states = encode_prompts(encoders.text_encoder, encoders.tokenizer, batch)[:, :length]  # (N, L, D)
        return states if encoders.adapter is None else states @ encoders.adapter.T

    shape = (len(captions), length, encoders.text_encoder.config.hidden_size)
    _write(path, shape, _batched(captions, config.batch_size), encode, what)


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _write(
    path: Path,
    shape: tuple[int, ...],
    batches: Iterator[Sequence[Any]],
    encode: Callable[[Sequence[Any]], Tensor],
    what: str,
) -> None:
    if path.exists():
        return
    with progress(what, shape[0]) as advance:

        def parts() -> Iterator[Tensor]:
            for batch in batches:
                yield encode(batch)
                advance(len(batch))

        write_array(path, shape, parts())
