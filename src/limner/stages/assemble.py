"""`limner assemble`: a text encoder, a VAE and a U-Net become a model that any Diffusers program loads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limner import __version__
from limner.artifacts import atomic_folder, read_json, write_json, write_text
from limner.config import AssembleConfig
from limner.errors import ConfigError, ModelError
from limner.models import clip as clips
from limner.models import loading
from limner.models import vae as vaes
from limner.models.card import model_card

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Parts:
    """What a model is joined from, and the sha256 of each part's weights as it was before."""

    text_encoder: Any
    tokenizer: Any
    vae: Any
    unet: Any
    scheduler: Any
    clip: Any | None
    normalisation: dict[str, list[float]]
    parents: dict[str, str]


def run(config: AssembleConfig) -> Path:
    """Write the model folder. -> it.

    Raises ModelError where the parts don't fit each other, ConfigError where the folder holds something else.
    """
    parts = _load(config)
    _check_fit(parts)
    text = _card_text(config)
    facts = _facts(config, parts, text)
    if _is_there(config.out, facts):
        print(f"Nothing to do: {config.out} holds this model.")
        return config.out
    with loading.quiet(), atomic_folder(config.out) as folder:
        _save(parts, DTYPES[config.precision], folder)
        write_json(folder / "manifest.json", facts)
        write_text(folder / "MODEL_CARD.md", model_card(folder, facts, text))
    print(config.out)
    return config.out


def plan(config: AssembleConfig) -> dict[str, Any]:
    """What `run` would do; nothing is written. Raises as `run` does."""
    parts = _load(config)
    _check_fit(parts)
    _is_there(config.out, _facts(config, parts, _card_text(config)))
    networks = {"text encoder": parts.text_encoder, "VAE": parts.vae, "U-Net": parts.unet, "CLIP": parts.clip}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in networks.items() if part is not None}
    size = sum(counts.values()) * DTYPES[config.precision].itemsize
    side = parts.unet.config["sample_size"] * vaes.factor(parts.vae.config)
    return {
        **{name: f"{count / 1e6:.1f} M parameters" for name, count in counts.items()},
        "draws": f"{side}x{side} pixels",
        "disk": f"{size / 1e6:,.0f} MB in {config.precision}",
        "out": config.out,
    }


def _load(config: AssembleConfig) -> Parts:
    text_encoder, tokenizer = loading.load_text_encoder(config.clip)
    try:  # a Stable Diffusion folder has a text encoder alone
        clip_folder = loading.component(config.clip, "clip")
    except ModelError:
        clip, normalisation = None, clips.OPENAI
    else:
        clip, normalisation = loading.load_clip(config.clip)[0], clips.read_normalisation(clip_folder)
    return Parts(
        text_encoder,
        tokenizer,
        loading.load_vae(config.vae),
        loading.load_unet(config.unet),
        loading.load_scheduler(config.unet),
        clip,
        normalisation,
        {
            "clip": loading.text_identity(config.clip),
            "vae": loading.identity(config.vae, "vae"),
            "unet": loading.identity(config.unet, "unet"),
        },
    )


def _check_fit(parts: Parts) -> None:
    """Raise ModelError naming every number in which the parts differ."""
    text, vae, unet = parts.text_encoder.config, parts.vae.config, parts.unet.config
    pairs = (
        ("the text encoder's width", text.hidden_size, "the U-Net's cross_attention_dim", unet["cross_attention_dim"]),
        ("the VAE's latent channels", vae["latent_channels"], "the U-Net's in_channels", unet["in_channels"]),
        ("the tokenizer's entries", len(parts.tokenizer), "the text encoder's vocab_size", text.vocab_size),
    )
    if wrong := [f"{one} {a} against {other} {b}" for one, a, other, b in pairs if a != b]:
        raise ModelError(f"The parts don't fit together: {', '.join(wrong)}; take parts that were trained together.")


def _facts(config: AssembleConfig, parts: Parts, text: str) -> dict[str, Any]:
    """The model's manifest: all that makes it what it is."""
    return {
        "limner": __version__,
        "parents": parts.parents,
        "defaults": {"steps": config.steps, "guidance": config.guidance},
        "precision": config.precision,
        "scheduler": json.loads(parts.scheduler.to_json_string(), parse_constant=str),
        "card": hashlib.sha256(text.encode()).hexdigest(),
        "trainings": _trainings(config),
    }


def _is_there(out: Path, facts: dict[str, Any]) -> bool:
    """Whether `out` holds this very model. Raises ConfigError where it holds something else."""
    if out.is_file():
        raise ConfigError(f"{out} is a file; choose another --out.")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    manifest = out / "manifest.json"
    if not manifest.is_file() or read_json(manifest) != facts:
        raise ConfigError(f"{out} holds something else; delete it or choose another --out.")
    return True


def _card_text(config: AssembleConfig) -> str:
    if config.card is None:
        return ""
    try:
        return config.card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"The card {config.card} can't be read ({reason}); name a Markdown file.") from None


def _trainings(config: AssembleConfig) -> dict[str, Any]:
    """What the manifests of the runs say that the parts come from; parts of other models have none."""
    trainings = {}
    for role, ref in (("clip", config.clip), ("vae", config.vae), ("unet", config.unet)):
        file = Path(ref) / "manifest.json"
        if file.is_file() and "images" in (manifest := read_json(file)):
            trainings[role] = {name: manifest[name] for name in ("images", "seed", "validation", "hardware")}
    return trainings


def _save(parts: Parts, dtype: torch.dtype, folder: Path) -> None:
    """Write the parts as Diffusers lays them out."""
    from diffusers import StableDiffusionPipeline

    networks = [part.to(dtype) for part in (parts.text_encoder, parts.vae, parts.unet)]
    pipeline = StableDiffusionPipeline(
        text_encoder=networks[0],
        vae=networks[1],
        unet=networks[2],
        tokenizer=parts.tokenizer,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    if parts.clip is not None:
        clips.save(parts.clip.to(dtype), parts.tokenizer, parts.normalisation, folder / "clip")
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
