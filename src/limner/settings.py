"""Presets, and how a configuration is put together.

In rising order: the defaults of `config/`, a preset, a TOML or JSON file (`--config`; the `config.json` of a run is
one), `--set key=value`, and the flags.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from limner.config import (
    Argument,
    AssembleConfig,
    CommandConfig,
    StageConfig,
    TrainClipConfig,
    TrainUnetConfig,
    TrainVaeConfig,
)
from limner.errors import ConfigError

MISSION = ("A golden retriever playing in a field.", "A toddler playing in a sandbox.")

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""How torch's threads wait for each other: they soon sleep in place of spinning, half the time beside other programs;
but not at once, which costs a training a tenth (docs/experiments.md)."""

VAE_WEIGHTS = {"perceptual_weight": 1.25, "weave_weight": 300}  # of the built-in VAE's losses, in both its trainings

BUILTIN_CLIP = {
    "images": 80_000,
    "batch_size": 256,
    "lr": 7e-4,
    "weight_decay": 0.2,
    "min_scale": 0.4,
    "colour": 0.2,
    "teacher_weight": 5.0,
    "warmup": 4_000,
    "ema_halflife": 3_000,
    "validate_every": 8_000,
    "checkpoint_every": 8_000,
}
BUILTIN_VAE = {
    "channels": (32, 64, 128, 144),
    "latent_channels": 8,
    "images": 400_000,
    "batch_size": 128,
    **VAE_WEIGHTS,
    "precision": "bf16",
    "warmup": 8_000,
    "ema_halflife": 8_000,
    "validate_every": 64_000,
    "checkpoint_every": 12_800,
}
BUILTIN_UNET = {
    "images": 3_192_000,
    "batch_size": 1024,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "dropout": 0.1,
    "precision": "bf16",
    "warmup": 200_000,
    "ema_halflife": 100_000,
    "validate_every": 500_000,
    "checkpoint_every": 250_000,
    "sample_prompts": MISSION,
}
BUILTIN_TUNED_VAE = {
    "images": 32_000,
    "batch_size": 16,
    "lr": 6e-4,
    **VAE_WEIGHTS,
    "warmup": 320,
    "ema_halflife": 1_000,
    "validate_every": 3_008,
    "checkpoint_every": 3_008,
}
BUILTIN_TUNED_UNET = {
    "images": 300_000,
    "batch_size": 64,
    "validate_every": 16_000,
    "checkpoint_every": 10_000,
    "sample_prompts": MISSION,
}

PRESETS: dict[type[StageConfig], dict[str, dict[str, Any]]] = {
    # What recipes/builtin uses, cut for one GPU; docs/experiments.md has what each reached. With builtin-tuned VAE and
    # U-Net go on from there on two CPU cores.
    # On the base of recipes/base_clip.py, test text to image R@1/5/10: 3.5/12.7/19.7 % before, 13.8/34.4/47.4 after
    TrainClipConfig: {"builtin": BUILTIN_CLIP},
    TrainVaeConfig: {"builtin": BUILTIN_VAE, "builtin-tuned": BUILTIN_TUNED_VAE},
    TrainUnetConfig: {"builtin": BUILTIN_UNET, "builtin-tuned": BUILTIN_TUNED_UNET},
    AssembleConfig: {
        "builtin": {"precision": "bf16", "steps": 8, "guidance": 6.0},
    },
}
"""Named settings of a stage; the comment beside one says what it reached."""

C = TypeVar("C", bound=CommandConfig)


def resolve(
    cls: type[C],
    flags: Mapping[str, Any],
    *,
    preset: str | None = None,
    file: Path | None = None,
    sets: Iterable[str] = (),
) -> C:
    """Put a configuration together; later sources win: defaults, preset, file, sets (`key=value`), flags.

    Raises ConfigError in one sentence: an unknown preset or key, a value out of range, an unreadable file.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        presets = PRESETS.get(cls, {}) if issubclass(cls, StageConfig) else {}
        if preset not in presets:
            known = ", ".join(sorted(presets)) or "none for this command"
            raise ConfigError(f"There is no preset {preset!r}; known: {known}.")
        values |= presets[preset]
    if file is not None:
        values |= _read(file)
    values |= dict(_assignment(text) for text in sets)
    values |= flags
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(cls, error)) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"The configuration file {file} can't be read ({reason}); mend or leave out --config."
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"The configuration file {file} must hold settings by name.")
    return values


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key=value, not {text!r}.")
    try:
        return key.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return key.strip(), value


def _sentence(cls: type[CommandConfig], error: ValidationError) -> str:
    """Say the first of pydantic's complaints in one sentence."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"There is no setting {name!r}; --help and config/ list them."
    if first["type"] == "missing" and len(first["loc"]) == 1:  # else it is an entry of a setting that lacks one
        by_position = any(isinstance(mark, Argument) for mark in cls.model_fields[name].metadata)
        return f"{'' if by_position else '--'}{name} is missing; see --help."
    message = first["msg"].removeprefix("Value error, ")
    if not name:
        return f"{message}."
    return f"{name}: {message[0].lower()}{message[1:]}, not {first['input']!r}."
