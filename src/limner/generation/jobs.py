"""What to draw: a model's own settings, read from its JSON files before anything heavy is, and jobs that fit them."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limner.config.stages import MOST_PICTURES
from limner.diffusion import samplers
from limner.errors import ConfigError, ModelError
from limner.generation import language
from limner.generation import prompts as texts
from limner.generation.sources import Source
from limner.models import hub, inversion, loading
from limner.models.inversion import Inversion
from limner.models.lora import Lora, find

log = logging.getLogger(__name__)

STABLE_DIFFUSION = {
    "text_encoder": loading.CLASSES["text_encoder"],
    "unet": loading.CLASSES["unet"],
    "vae": loading.CLASSES["vae"],
}
"""The parts with weights that Limner's own loop draws with."""

MOST_PIXELS_A_SIDE = 8192
STRENGTH = 0.6  # of a picture to begin with, where none is asked for
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
class Variation:
    """Another seed, towards whose noise a picture's own is turned, and by which share: 0 not at all, 1 all the way."""

    seed: int
    strength: float


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
    reuse: int = 1
    """At each so many steps the inner blocks of the U-Net are computed."""
    template: str | None = None
    """The prompt with its alternatives, where it had some."""
    negative_template: str | None = None
    variation: Variation | None = None
    image: Source | None = None
    """The picture to begin with."""
    mask: Source | None = None
    """What of it is redrawn."""
    strength: float | None = None
    """Share of the steps that are taken from there; None without `image`."""

    @property
    def steps_taken(self) -> int:
        """Steps through the denoising loop that the picture takes, where that is known."""
        return steps_taken(self.steps or 0, self.strength)


def steps_taken(steps: int, strength: float | None) -> int:
    """How many of the steps are taken from a picture at this strength, as Diffusers counts them; all without one."""
    return steps if strength is None else min(int(steps * strength), steps)


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
    reuse: int = 1,
    variation: str | None = None,
    image: Source | None = None,
    mask: Source | None = None,
    strength: float | None = None,
) -> list[Job]:
    """The pictures to draw: `n` a prompt with the seeds `seed`, `seed + 1`, ...; what is None is the model's own.

    `size` is SIDE or WIDTHxHEIGHT; without it pictures that begin with an `image` have its shape, and as many pixels
    as the model's own. `scheduler` is a name of `samplers`; of a prompt's alternatives each picture has one
    (`language.chosen`). With a `variation`, SEED:STRENGTH, it is that seed that rises, around one `seed`. Raises
    ConfigError where a setting is out of range, size or scheduler don't fit, or the model can't begin with a picture.
    """
    if n < 1:
        raise ConfigError(f"n must be 1 or more, not {n}.")
    check_count(n * max(len(prompts), 1))
    rising = n - 1 if variation is None else 0
    if not 0 <= seed < 2**63 - rising:
        raise ConfigError(f"seed must be from 0 to 2^63 - 1, and so the seeds that follow it, not {seed}.")
    steps = spec.steps if steps is None else steps
    guidance = spec.guidance if guidance is None else guidance
    _check_numbers(steps, guidance)
    strength = _checked_strength(spec, steps, image, mask, strength)
    own_size = (spec.size or (None, None)) if image is None else _shaped(spec, image)
    width, height = own_size if size is None else _fitting(size, spec.factor)
    if not 0 <= guidance_rescale <= 1:
        raise ConfigError(f"guidance_rescale must be from 0 to 1, not {guidance_rescale}.")
    if reuse < 1 or (reuse > 1 and not spec.own_loop):
        raise ConfigError(f"reuse must be 1, or more for Stable Diffusion 1 and 2, not {reuse}.")
    if scheduler is not None:
        scheduler = samplers.checked(scheduler, spec.scheduler or {})
    settings = Job("", "", 0, steps, guidance, width, height, scheduler, guidance_rescale, reuse)
    settings = replace(settings, image=image, mask=mask, strength=strength)
    negative = texts.checked_negative(negative)
    first = _variation(spec, variation, n)
    own = [(seed + i, None) if first is None else (seed, replace(first, seed=first.seed + i)) for i in range(n)]
    return [
        _worded(replace(settings, variation=varied), texts.checked(prompt), negative, number)
        for prompt in prompts
        for number, varied in own
    ]


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


def check_count(pictures: int) -> None:
    """Raise ConfigError where those are more pictures than jobs fit into memory."""
    if pictures > MOST_PICTURES:
        raise ConfigError(f"That makes {pictures} pictures, and {MOST_PICTURES} can be drawn at a time; draw fewer.")


def warn_of_sizes(spec: Spec, jobs: Sequence[Job]) -> None:
    """Say once which of the jobs' sizes the model was not trained at, where it tells the one that it was."""
    sizes = dict.fromkeys((job.width, job.height) for job in jobs)
    if spec.size is not None and (others := [size for size in sizes if size != spec.size]):
        at = ", ".join(f"{width}x{height}" for width, height in others)
        log.warning("%s was trained at %dx%d pixels; pictures of %s may be worse.", spec.ref, *spec.size, at)


def _check_numbers(steps: int | None, guidance: float | None) -> None:
    if steps is not None and not 1 <= steps <= 1000:
        raise ConfigError(f"steps must be from 1 to 1000, not {steps}.")
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 1):
        raise ConfigError(f"guidance must be 1 or more, not {guidance}; 1 is off.")


def _checked_strength(
    spec: Spec, steps: int | None, image: Source | None, mask: Source | None, strength: float | None
) -> float | None:
    """The strength, `STRENGTH` where none is asked for, or 1 with a mask; None without an image. Raises ConfigError."""
    if image is None:
        if mask is not None or strength is not None:
            raise ConfigError(f"A {'mask' if mask else 'strength'} needs a picture to begin with; name one as image.")
        return None
    if not spec.own_loop:
        raise ConfigError(f"{spec.ref} is a {spec.pipeline}; only Stable Diffusion 1 and 2 begin with a picture here.")
    if strength is None:
        strength = STRENGTH if mask is None else 1.0
    if not 0 < strength <= 1:
        raise ConfigError(f"strength must be above 0 and at most 1, not {strength:g}.")
    assert steps is not None
    if not steps_taken(steps, strength):
        raise ConfigError(f"strength {strength:g} of {steps} steps is not one step; raise either.")
    return strength


def _shaped(spec: Spec, image: Source) -> tuple[int, int]:
    """Width and height of the picture's shape, with about as many pixels as the model's own size."""
    assert spec.size is not None
    wide, high = image.image.size
    scale = math.sqrt(spec.size[0] * spec.size[1] / (wide * high)) / spec.factor
    most = MOST_PIXELS_A_SIDE // spec.factor
    width, height = (min(max(round(side * scale), 1), most) * spec.factor for side in (wide, high))
    return width, height


def _variation(spec: Spec, text: str | None, n: int) -> Variation | None:
    """The first of `n` variations, whose seeds follow each other. Raises ConfigError."""
    if text is None:
        return None
    if not spec.own_loop:
        raise ConfigError(f"{spec.ref} is a {spec.pipeline}; only Stable Diffusion 1 and 2 draw variations here.")
    seed, _, strength = text.partition(":")
    try:
        variation = Variation(int(seed), float(strength))
    except ValueError:
        variation = None
    if variation is None or not (0 <= variation.seed <= 2**63 - n and 0 <= variation.strength <= 1):
        raise ConfigError(f"The variation {text!r} is not SEED:STRENGTH, such as 8:0.2, with a strength from 0 to 1.")
    return variation


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


def count_parameters(spec: Spec, parts: Sequence[str] | None = None) -> dict[str, int]:
    """Numbers in the weights of each part that draws, or of others, read off the heads of their files.

    Raises ModelError.
    """
    named = spec.parts if parts is None else parts
    counts = {part: sum(map(_numbers_in, hub.weight_files(spec.folder / part))) for part in named}
    return {part: count for part, count in counts.items() if count}


def _numbers_in(file: Path) -> int:
    try:
        with file.open("rb") as weights:
            head: dict[str, Any] = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
        return sum(math.prod(entry["shape"]) for name, entry in head.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        raise ModelError(f"The weights {file} can't be read; fetch or make them again.") from None
