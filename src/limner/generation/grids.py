"""Grids over settings: which values of which, and the drawn pictures as one, with its axes labelled."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from limner import settings
from limner.config import GenerateConfig
from limner.errors import ConfigError
from limner.generation import sheets

if TYPE_CHECKING:
    from PIL.Image import Image

    from limner.generation.jobs import Job

SETTINGS = (
    "steps",
    "guidance",
    "seed",
    "negative",
    "size",
    "scheduler",
    "guidance_rescale",
    "reuse",
    "strength",
    "variation",
)


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes."""

    name: str
    values: tuple[str, ...]


def axes(text: str) -> tuple[Axis, ...]:
    """One or two axes from `steps=4,8,20 guidance=1,3`; quotes hold values with spaces together. Raises ConfigError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"The grid {text!r} can't be read ({error}).") from None
    found = []
    for word in words:
        name, _, values = word.partition("=")
        if name not in SETTINGS or not all(values.split(",")):
            raise ConfigError(f"{word!r} is no axis of a grid; write SETTING=VALUE,VALUE of {', '.join(SETTINGS)}.")
        found.append(Axis(name, tuple(values.split(","))))
    if not 1 <= len({axis.name for axis in found}) == len(found) <= 2:
        raise ConfigError(f"The grid {text!r} is not over one setting or two different ones.")
    return tuple(found)


def cells(config: GenerateConfig, over: Sequence[Axis]) -> list[GenerateConfig]:
    """The configuration of each cell, column by column; one of all without axes.

    Raises ConfigError where a value is out of range.
    """
    given = config.model_dump(exclude_unset=True)
    names = [axis.name for axis in over]
    return [
        settings.resolve(GenerateConfig, {**given, **dict(zip(names, values))})
        for values in product(*(axis.values for axis in over))
    ]


def grids(over: Sequence[Axis], drawn: Sequence[Sequence[Image]], jobs: Sequence[Job]) -> list[Image]:
    """The pictures of each cell as grids, the first axis from left to right.

    drawn: for each of `cells` its pictures; jobs: those of the first cell. With two axes the second goes down, and
    each job has a grid; with one each job has a row.
    """
    (first, *rest) = over
    labels = [f"{first.name} {value}" for value in first.values]
    shown = [label(job, names={axis.name for axis in over}) for job in jobs]
    if not rest:
        return [sheets.grid(dict(zip(labels, drawn, strict=True)), shown)]
    captions = [f"{rest[0].name} {value}" for value in rest[0].values]
    high = len(captions)
    columns = [drawn[i : i + high] for i in range(0, len(drawn), high)]
    return [
        sheets.grid({name: [cell[k] for cell in column] for name, column in zip(labels, columns)}, captions, title)
        for k, title in enumerate(shown)
    ]


def label(job: Job, names: set[str] | None = None) -> str:
    """What a job is called on a sheet: its prompt and seed, but for what the axes `names` tell already."""
    seeds = [f"seed\u00a0{job.seed}"] if "seed" not in (names or ()) else []
    if job.variation is not None and "variation" not in (names or ()):
        seeds.append(f"variation\u00a0{job.variation.seed}:{job.variation.strength:g}")
    # Of alternatives each seed has its own
    prompt = job.template or job.prompt if "seed" in (names or ()) else job.prompt
    return f"{prompt} ({', '.join(seeds)})" if seeds else prompt
