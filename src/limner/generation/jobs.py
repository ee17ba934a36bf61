"""What to draw: a model's own settings, read from its JSON files before anything heavy is, and jobs that fit them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limner.diffusion import samplers
from limner.errors import ConfigError, ModelError
from limner.generation import language
from limner.generation import prompts as texts
from limner.models import hub, inversion, loading
from limner.models.inversion import Inversion
from limner.models.lora import Lora, find

STABLE_DIFFUSION = {
    "text_encoder": loading.CLASSES["text_encoder"],
    "unet": loading.CLASSES["unet"],
    "vae": loading.CLASSES["vae"],
}
"""The parts with weights that Limner's own loop draws with."""

MOST_PIXELS_A_SIDE = 8192
STEPS, GUIDANCE = 25, 7.5  # of a model whose manifest.json names none, and that our own loop draws


@dataclass(frozen=True)
class Spec:
    """What a model folder says about itself."""

    ref: str
    """What the user calls it: `builtin`, a folder or a hub id."""
    folder: Path
    pipeline: str
    """Diffusers' class for the whole."""
    parts: tuple[str, ...]
    """The folders whose weights draw the picture."""
    own_loop: bool
    """Whether Limner's own loop draws (Stable Diffusion's parts), or else Diffusers' pipeline."""
    steps: int | None
    guidance: float | None
    size: tuple[int, int] | None
    """Width and height in pixels. Like steps and guidance: what it draws with when not told; None is the pipeline's."""
    factor: int
    """Both sides of a picture are multiples of this; 1 where only the pipeline knows."""
    scheduler: Mapping[str, Any] | None = None
    """The configuration of the scheduler that it draws with when not told; None where only the pipeline knows."""


@dataclass(frozen=True)
class Job:
    """One picture to draw; None leaves a setting to the pipeline."""

    prompt: str
    negative: str
    seed: int
    steps: int | None
    guidance: float | None
    width: int | None
    height: int | None
    scheduler: str | None = None
    """A name of `samplers`; None is the model's own."""
    guidance_rescale: float = 0.0
    """How much of guidance's contrast is taken back, from 0 to 1."""
    template: str | None = None
    """The prompt with its alternatives, where it had some."""
    negative_template: str | None = None


def read_spec(ref: str, folder: Path | None = None) -> Spec:
    """What the model says about itself; without the `folder` that it lies in, `ref` is resolved, a hub id fetched.

    Raises ModelError.
    """
    folder = folder or loading.resolve(ref)
    index = loading.pipeline_index(folder)
    listed = hub.pipeline_parts(index)
    own_loop = index["_class_name"] == "StableDiffusionPipeline" and all(
        listed.get(part, ("", ""))[1] in classes for part, classes in STABLE_DIFFUSION.items()
    )
    parts = tuple(STABLE_DIFFUSION) if own_loop else tuple(listed)
    steps, guidance = _defaults(folder)
    size, factor, scheduler = None, 1, None
    if own_loop:
        scheduler = loading.read_config(loading.component(str(folder), "scheduler") / "scheduler_config.json")
        steps, guidance = steps or STEPS, guidance or GUIDANCE
        size, factor = _size_and_factor(folder)
    return Spec(ref, folder, index["_class_name"], parts, own_loop, steps, guidance, size, factor, scheduler)


def _size_and_factor(folder: Path) -> tuple[tuple[int, int], int]:
    """Width and height in pixels that the U-Net was trained for, and the pixels a latent of the VAE."""
    from limner.models import vae

    unet_file, vae_file = (loading.component(str(folder), part) / "config.json" for part in ("unet", "vae"))
    try:
        factor = vae.factor(loading.read_config(vae_file))
        side = loading.read_config(unet_file)["sample_size"]
        height, width = (side, side) if isinstance(side, int) else map(int, side)
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{unet_file} and {vae_file} don't tell the size of a picture; fetch them again.") from None
    return (width * factor, height * factor), factor


def _defaults(folder: Path) -> tuple[int | None, float | None]:
    """Steps and guidance of the manifest.json that `limner assemble` writes."""
    file = folder / "manifest.json"
    named = loading.read_config(file).get("defaults") if file.is_file() else None
    if named is None:
        return None, None
    try:
        steps, guidance = int(named["steps"]), float(named["guidance"])
        _check_numbers(steps, guidance)
    except (KeyError, TypeError, ValueError, ConfigError):
        raise ModelError(f"The defaults in {file} can't be used; name steps and guidance there.") from None
    return steps, guidance


def read_loras(spec: Spec, texts: Sequence[str]) -> tuple[Lora, ...]:
    """The LoRAs to draw with, each FILE or FILE:WEIGHT. Raises ModelError or ConfigError as `lora.find` does."""
    if texts and not spec.own_loop:
        raise ModelError(f"{spec.ref} is a {spec.pipeline}; a LoRA can be added to Stable Diffusion 1 and 2 only.")
    return tuple(find(text) for text in texts)


def read_embeddings(spec: Spec, texts: Sequence[str]) -> tuple[Inversion, ...]:
    """The textual inversions to draw with, each FILE or FILE:TOKEN. Raises as `inversion.find` does."""
    if texts and not spec.own_loop:
        raise ModelError(
            f"{spec.ref} is a {spec.pipeline}; an embedding can be added to Stable Diffusion 1 and 2 only."
        )
    return tuple(inversion.find(text) for text in texts)


def make_jobs(
    spec: Spec,
    prompts: Sequence[str],
    *,
    n: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    size: str | int | None = None,
    scheduler: str | None = None,
    guidance_rescale: float = 0.0,
) -> list[Job]:
    """The pictures to draw: `n` a prompt with the seeds `seed`, `seed + 1`, ...; what is None is the model's own.

    `size` is SIDE or WIDTHxHEIGHT, `scheduler` a name of `samplers`; of a prompt's alternatives each picture has one
    (`language.chosen`). Raises ConfigError where a setting is out of range, or size or scheduler don't fit.
    """
    if n < 1:
        raise ConfigError(f"n must be 1 or more, not {n}.")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be from 0 to 2^63 - 1, not {seed}.")
    steps = spec.steps if steps is None else steps
    guidance = spec.guidance if guidance is None else guidance
    _check_numbers(steps, guidance)
    width, height = (spec.size or (None, None)) if size is None else _fitting(size, spec.factor)
    if not 0 <= guidance_rescale <= 1:
        raise ConfigError(f"guidance_rescale must be from 0 to 1, not {guidance_rescale}.")
    if scheduler is not None:
        scheduler = samplers.checked(scheduler, spec.scheduler or {})
    settings = Job("", "", 0, steps, guidance, width, height, scheduler, guidance_rescale)
    negative = texts.checked_negative(negative)
    return [_worded(settings, texts.checked(prompt), negative, seed + i) for prompt in prompts for i in range(n)]


def _worded(settings: Job, template: str, negative_template: str, seed: int) -> Job:
    """The job for a seed, with what it says of the alternatives in its prompts. Raises ConfigError."""
    prompt, negative = (language.chosen(text, seed) for text in (template, negative_template))
    if not prompt.strip():
        raise ConfigError(f"The prompt {template!r} says nothing with seed {seed}; give each alternative words.")
    for text in (prompt, negative):
        language.parse(text)
    return replace(
        settings,
        prompt=prompt,
        negative=negative,
        seed=seed,
        template=None if template == prompt else template,
        negative_template=None if negative_template == negative else negative_template,
    )


def _check_numbers(steps: int | None, guidance: float | None) -> None:
    if steps is not None and not 1 <= steps <= 1000:
        raise ConfigError(f"steps must be from 1 to 1000, not {steps}.")
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 1):
        raise ConfigError(f"guidance must be 1 or more, not {guidance}; 1 is off.")


def _fitting(size: str | int, factor: int) -> tuple[int, int]:
    """Width and height of a size that the model can draw."""
    found = re.fullmatch(r"(\d{1,9})(?:[x×](\d{1,9}))?", str(size).strip(), re.IGNORECASE | re.ASCII)
    if not found:
        raise ConfigError(f"The size {size!r} is not SIDE or WIDTHxHEIGHT in pixels, such as 512 or 768x512.")
    sides = int(found[1]), int(found[2] or found[1])
    if not all(1 <= side <= MOST_PIXELS_A_SIDE for side in sides):
        raise ConfigError(f"The size {size} is out of range; a side has 1 to {MOST_PIXELS_A_SIDE} pixels.")
    if any(side % factor for side in sides):
        below = [max(side // factor, 1) * factor for side in sides]
        above = [-(-side // factor) * factor for side in sides]
        nearest = " and ".join(dict.fromkeys("x".join(map(str, both)) for both in (below, above)))
        raise ConfigError(
            f"The size {sides[0]}x{sides[1]} is not divisible by {factor}, which this model needs; "
            f"the nearest that fit: {nearest}."
        )
    return sides


def count_parameters(spec: Spec) -> dict[str, int]:
    """Numbers in the weights of each part, read off the heads of their files. Raises ModelError."""
    counts = {part: sum(map(_numbers_in, (spec.folder / part).glob("*.safetensors"))) for part in spec.parts}
    return {part: count for part, count in counts.items() if count}


def _numbers_in(file: Path) -> int:
    try:
        with file.open("rb") as weights:
            head: dict[str, Any] = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
        return sum(math.prod(entry["shape"]) for name, entry in head.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        raise ModelError(f"The weights {file} can't be read; fetch or make them again.") from None
