"""The models that a training of a U-Net went through, by the checkpoints that it kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limner.artifacts import atomic_folder, read_json, write_json
from limner.config import EncodeConfig
from limner.data.latents import settings_of
from limner.errors import ModelError
from limner.models import adapter, loading, pipeline
from limner.training import checkpoints


def find(run: Path) -> dict[int, Path]:
    """The checkpoints of a finished `train unet` run by the images that they had seen, fewest first.

    Raises ModelError where `run` is no such run, or keeps none.
    """
    if not (run / "model" / "unet").is_dir() or not (run / "config.json").is_file():
        raise ModelError(f"{run} is no finished run of limner train unet, whose checkpoints could be drawn with.")
    folders = [*checkpoints.numbered(run / "checkpoints"), run / "checkpoints" / checkpoints.BEST]
    files = [file for folder in folders if (file := folder / checkpoints.FACTS).is_file()]
    if not files:
        raise ModelError(f"{run} keeps no checkpoints; without them its end alone can be drawn with, by assemble.")
    return dict(sorted({int(read_json(file)["images"]): file.parent for file in files}.items()))


def assemble(run: Path, found: Mapping[int, Path], out: Path) -> dict[int, Path]:
    """Write the weight average of each checkpoint as a model below `out`, with the VAE and the CLIP that the run was
    trained on; what is there already is kept. -> the folders by the images seen.

    Raises ModelError where a part or a checkpoint can't be read, DataError where VAE or CLIP are others by now.
    """
    encoded = settings_of(Path(read_json(run / "config.json")["data"]))
    parents = {"vae": loading.identity(encoded.vae, "vae"), "clip": loading.text_identity(encoded.clip)}
    folders = {images: out / f"{images}-images" for images in found}
    for images, folder in folders.items():
        facts = {"parents": {**parents, "unet": read_json(found[images] / checkpoints.FACTS)["sha256"]}}
        if not (folder / "manifest.json").is_file() or read_json(folder / "manifest.json") != facts:
            with loading.quiet(), atomic_folder(folder) as partial:
                pipeline.save(partial, **_parts(run, encoded, found[images]))
                write_json(partial / "manifest.json", facts)
    return folders


def _parts(run: Path, encoded: EncodeConfig, checkpoint: Path) -> dict[str, Any]:
    text_encoder, tokenizer = loading.load_text_encoder(encoded.clip)
    unet = loading.load_unet(str(run))
    checkpoints.load_average(checkpoint, unet)
    if (own := adapter.find(encoded.clip)) is not None:
        adapter.fold(unet, adapter.load(own, text_encoder.config.hidden_size))
    return {
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "vae": loading.load_vae(encoded.vae),
        "unet": unet,
        "scheduler": loading.load_scheduler(str(run)),
    }
