"""Figures over a training: one JSON object a line in `events.jsonl`, and TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor


class Journal:
    """Writes figures by the number of images seen; the rate counts this process's part of the run alone."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.file = folder / "events.jsonl"
        self.accelerator = accelerator
        accelerator.init_trackers("tensorboard")
        self.started: tuple[float, int] | None = None

    def write(self, seen: int, figures: dict[str, Any]) -> None:
        """Add figures, scalars by name, at `seen` images."""
        now = time.monotonic()
        began, first = self.started = self.started or (now, seen)
        values = {name: float(v.detach() if isinstance(v, Tensor) else v) for name, v in figures.items()}
        if seen > first:
            values["images_per_second"] = (seen - first) / (now - began)
        self.accelerator.log(values, step=seen)
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"images": seen, "seconds": round(now - began, 1), **values}) + "\n")
