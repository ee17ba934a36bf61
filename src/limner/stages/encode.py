"""`limner encode`: VAE moments of every picture and token states of every caption, once, for all U-Net trainings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.artifacts import Run
from limner.config import EncodeConfig
from limner.data.dataset import Record, Split, read_split, read_training_split, split_identity
from limner.data.latents import write_array, write_captions
from limner.data.pictures import load_pixels
from limner.errors import ConfigError
from limner.generation.engine import encode_prompts
from limner.generation.prompts import length_of
from limner.models import loading
from limner.models import vae as vaes
from limner.models.gate import TextFacts
from limner.progress import progress

ENCODED: tuple[Split, ...] = ("train", "val")  # test only reports


@dataclass(frozen=True)
class Encoders:
    """What turns pictures and captions into what the U-Net sees."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    device: torch.device


def run(config: EncodeConfig) -> Path:
    """Write the latent cache to `out/cache`, array by array; arrays that an earlier run finished are kept.

    -> the run folder. Raises DataError, ModelError, ConfigError or RunError in one sentence.
    """
    started = time.time()
    splits = _splits(config)
    encoders = _load(config)
    parents = {f"data/{split}": split_identity(config.data, split) for split, records in splits.items() if records}
    parents |= {"vae": loading.identity(config.vae, "vae"), "clip": loading.text_identity(config.clip)}
    run = Run.open(config.out, config, parents)
    if run.finished:
        print(f"Nothing to do: {run.folder} is finished, with these encoders and settings.")
        return run.folder
    cache = run.folder / "cache"
    for split, records in splits.items():
        _encode_pictures(config, encoders, records, cache / split / "moments.npy")
        write_captions(cache / split / "captions.json", [record.captions for record in records])
        captions = [caption for record in records for caption in record.captions]
        _encode_captions(config, encoders, captions, cache / split / "states.npy", f"{split} captions")
    _encode_captions(config, encoders, [""], cache / "empty.npy", "empty prompt")
    text = TextFacts.of(encoders.text_encoder.config.to_dict(), encoders.tokenizer)
    pictures = {split: len(records) for split, records in splits.items()}
    run.finish(started=started, pictures=pictures, text=asdict(text))  # `assemble` asks what the U-Net was trained on
    print(cache)
    return run.folder


def plan(config: EncodeConfig) -> dict[str, Any]:
    """What `run` would do; nothing is written."""
    splits = _splits(config)
    encoders = _load(config)
    length = length_of(encoders.text_encoder, encoders.tokenizer)
    pictures = sum(len(records) for records in splits.values())
    captions = sum(len(record.captions) for records in splits.values() for record in records)
    side = config.size // vaes.factor(encoders.vae.config)
    views = 1 + config.flips
    moments = pictures * views * 2 * encoders.vae.config["latent_channels"] * side * side * 2
    states = captions * length * encoders.text_encoder.config.hidden_size * 2
    started = time.perf_counter()
    for record in splits["train"][:8]:
        _moments(encoders, load_pixels(record.path, config.size)[None])
    seconds = (time.perf_counter() - started) / len(splits["train"][:8]) * pictures * views
    return {
        "pictures": f"{pictures:,} in {views} views, latents of {side}x{side}",
        "captions": f"{captions:,}, {length} token states each",
        "disk": f"{(moments + states) / 1e6:,.0f} MB",
        "time": f"about {seconds / 60:,.0f} minutes for the pictures on {encoders.device}",
        "out": config.out,
    }


def _splits(config: EncodeConfig) -> dict[Split, list[Record]]:
    train = read_training_split(config.data, captioned=False)
    return {"train": train, "val": read_split(config.data, "val")}


def _load(config: EncodeConfig) -> Encoders:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = loading.load_vae(config.vae).to(device, memory_format=torch.channels_last)
    if config.size % vaes.factor(vae.config):
        raise ConfigError(f"--size {config.size} is not divisible by the VAE's factor {vaes.factor(vae.config)}.")
    text_encoder, tokenizer = loading.load_text_encoder(config.clip)
    return Encoders(vae, text_encoder.to(device), tokenizer, device)


@torch.no_grad()
def _moments(encoders: Encoders, pixels: Tensor) -> Tensor:
    return vaes.encode(encoders.vae, pixels.to(encoders.device))


def _encode_pictures(config: EncodeConfig, encoders: Encoders, records: Sequence[Record], path: Path) -> None:
    def encode(batch: Sequence[Record]) -> Tensor:
        pixels = torch.stack([load_pixels(record.path, config.size) for record in batch])  # (N, 3, H, W)
        views = [pixels, pixels.flip(-1)] if config.flips else [pixels]
        return torch.stack([_moments(encoders, view) for view in views], dim=1)  # (N, V, 2C, h, w)

    side = config.size // vaes.factor(encoders.vae.config)
    shape = (len(records), 1 + config.flips, 2 * encoders.vae.config["latent_channels"], side, side)
    _write(path, shape, _batched(records, config.batch_size), encode, f"{path.parent.name} pictures")


def _encode_captions(config: EncodeConfig, encoders: Encoders, captions: Sequence[str], path: Path, what: str) -> None:
    length = length_of(encoders.text_encoder, encoders.tokenizer)

    def encode(batch: Sequence[str]) -> Tensor:
        # A caption over one piece would be longer than its neighbours; training takes its first piece.
        return encode_prompts(encoders.text_encoder, encoders.tokenizer, batch)[:, :length]

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
