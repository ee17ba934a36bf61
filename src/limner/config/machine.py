"""Settings of the commands about models and the machine that they run on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from limner.config.base import FLAG, Argument, CommandConfig, Flag, StageConfig
from limner.config.stages import Engine, Precision


class ListModelsConfig(CommandConfig):
    """List the models here: the built-in one, those below a folder, and those of the hub's cache."""

    folder: Annotated[Path, Argument()] = Path()
    """Folder to look in, up to three levels deep; the one that you are in when left out."""
    as_json: Annotated[bool, Flag(("--json",))] = False
    """Print JSON."""


class ShowModelConfig(CommandConfig):
    """Show what a model is made of, and whether it runs on this machine."""

    model: Annotated[str, Argument()] = "builtin"
    """`builtin`, a Diffusers folder or a hub id."""
    as_json: Annotated[bool, Flag(("--json",))] = False
    """Print JSON."""


class PullModelConfig(CommandConfig):
    """Fetch a model from the hub into its cache; the same command again goes on where it was broken off."""

    model: Annotated[str, Argument()]
    """The hub id, owner/name or owner/name@revision."""


class ExportConfig(StageConfig):
    """Write text encoder, U-Net and VAE decoder in another program's format."""

    model: Annotated[str, Argument()] = "builtin"
    """`builtin`, a Diffusers folder or a hub id."""
    to: Annotated[Literal["onnx", "openvino"], FLAG]
    """Format: onnx or openvino."""
    out: Annotated[Path, FLAG]
    """Folder to write."""
    size: Annotated[str | None, FLAG] = None
    """Pixels as SIDE or WIDTHxHEIGHT, which the networks then have for good; the model's own when left out."""
    guided: Annotated[bool, FLAG] = True
    """Let the U-Net take two pictures at once, with and without the prompt, as guidance needs."""


class DoctorConfig(CommandConfig):
    """Say what this machine has, what Limner uses of it, and what is missing for which extra."""

    as_json: Annotated[bool, Flag(("--json",))] = False
    """Print JSON."""


class BenchConfig(StageConfig):
    """Measure seconds a picture and how well pictures fit their prompts, over steps, schedulers, precisions and
    engines.
    """

    model: Annotated[str, Argument()] = "builtin"
    """`builtin`, a Diffusers folder or a hub id."""
    out: Annotated[Path, FLAG] = Path("bench")
    """Folder for bench.json and bench.png."""
    steps: Annotated[tuple[PositiveInt, ...], FLAG] = (4, 8, 20)
    """Numbers of steps; may be repeated."""
    schedulers: Annotated[tuple[str, ...], FLAG] = ()
    """Schedulers by the names that `limner generate` knows; may be repeated; the model's own when left out."""
    precisions: Annotated[tuple[Precision, ...], FLAG] = ("auto",)
    """Precisions; may be repeated."""
    engines: Annotated[tuple[Engine, ...], FLAG] = ("torch",)
    """What computes, torch or openvino; may be repeated."""
    judge: Annotated[str | None, FLAG] = None
    """What scores the pictures: a folder of recipes/judge.py, or any CLIP that the model doesn't read its prompts with;
    the model's own when left out, which flatters it."""
    data: Annotated[Path | None, FLAG] = None
    """A dataset folder, of whose val captions the first `n` are drawn in place of `prompts`."""
    n: Annotated[PositiveInt, Flag(("-n",))] = 32
    """How many of those."""
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "A golden retriever playing in a field.",
        "A toddler playing in a sandbox.",
        "A man in a red jacket climbs a rock.",
        "A woman walks on the beach at sunset.",
    )
    """What is drawn for each setting, one picture each; one more before is not timed."""
    device: Annotated[str | None, FLAG] = None
    """`cpu` or `cuda`; the GPU when there is one."""
