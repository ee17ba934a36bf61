"""What the settings of all stages share, and how a field says that it is an argument or a flag."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Argument:
    """Marks a field that the command takes by position."""


@dataclass(frozen=True)
class Flag:
    """Marks a field that the command takes as `--name`, or under these other names too."""

    names: tuple[str, ...] = ()


FLAG = Flag()


class CommandConfig(BaseModel):
    """What all commands share, also those that only answer a question."""

    model_config = ConfigDict(
        defer_build=True,  # each command needs its own alone
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # --set size=256
    )


class StageConfig(CommandConfig):
    """What all stages share."""

    changeable: ClassVar[frozenset[str]] = frozenset()
    """Settings that may differ when a run is resumed: they change its length, roundings, or nothing of it."""

    out: Annotated[Path, FLAG]
    """Folder to write; running the same command again resumes there."""
