"""Figures over a training: one JSON object a line in `events.jsonl`, and the trackers that are set."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, get_available_trackers
from torch import Tensor

from limner.artifacts import write_text
from limner.config import TrainConfig
from limner.errors import ConfigError
from limner.training import memory

PROJECT = "limner"


def refuse_unavailable(trackers: tuple[str, ...]) -> None:
    """Raise ConfigError where a tracker's package is missing."""
    for name in trackers:
        if name not in map(str, get_available_trackers()):
            raise ConfigError(f"trackers has {name}, which needs a package: pip install {name}; or leave it out.")


class Journal:
    """Writes figures by the number of images seen; the rate counts this process's part of the run alone."""

    def __init__(self, folder: Path, config: TrainConfig, accelerator: Accelerator, seen: int) -> None:
        """Go on after `seen` images: what was written past them comes again, and is removed."""
        self.file = folder / "events.jsonl"
        self.accelerator = accelerator
        # TensorBoard takes the project for a folder's name, so that it is given one of its own
        board = TensorBoardTracker("tensorboard", folder, purge_step=seen + 1)
        accelerator.log_with = [board if name == "tensorboard" else name for name in config.trackers]
        accelerator.init_trackers(PROJECT, init_kwargs={"wandb": {"name": folder.name, "dir": str(folder)}})
        settings = json.loads(config.model_dump_json())
        plain = {name: v if isinstance(v, str | int | float) else str(v) for name, v in settings.items()}
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # which would make a run of its own of them
                tracker.store_init_configuration(plain)
        if accelerator.is_main_process and self.file.exists():
            whole = self.file.read_text(encoding="utf-8").split("\n")[:-1]  # of a line that a kill cut nothing is left
            write_text(self.file, "".join(f"{line}\n" for line in whole if json.loads(line)["images"] <= seen))
        self.started: tuple[float, int] | None = None

    def write(self, seen: int, figures: dict[str, Any]) -> None:
        """Add figures, scalars by name, at `seen` images."""
        now = time.monotonic()
        began, first = self.started = self.started or (now, seen)
        values = {name: float(v.detach() if isinstance(v, Tensor) else v) for name, v in figures.items()}
        if seen > first:
            values["images_per_second"] = (seen - first) / (now - began)
        if (peak := memory.peak(self.accelerator)) is not None:
            values["peak_memory_mb"] = peak / 1e6
        self.accelerator.log(values, step=seen)
        if self.accelerator.is_main_process:
            known = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"images": seen, "seconds": round(now - began, 1), **known}) + "\n")
