"""A model folder as Diffusers lays it out, written from its parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from limner.artifacts import write_json
from limner.models.clip import Clip


def save(
    folder: Path,
    *,
    text_encoder: Any,
    tokenizer: Any,
    vae: Any,
    unet: Any,
    scheduler: Any,
    clip: Clip | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the parts in `dtype`, which they are then in too, and beside them a `clip` with both towers."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        text_encoder=text_encoder.to(dtype),
        vae=vae.to(dtype),
        unet=unet.to(dtype),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for network in (vae, unet):
        network.register_to_config(_name_or_path="")  # a path of this machine, of no use on another
    pipeline.save_pretrained(folder, safe_serialization=True)
    if clip is not None:
        clip.network.to(dtype)
        clip.save(folder / "clip")
    for name in ("text_encoder", "clip"):
        _load_as_float32(folder / name / "config.json")


def _load_as_float32(file: Path) -> None:
    """Transformers loads weights in the precision that the config names; Diffusers in float32 unless told.

    Where the two differ, a plain pipeline would stop at the first attention, so both are float32.
    """
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if "dtype" in part:
                part["dtype"] = "float32"
        write_json(file, config)
