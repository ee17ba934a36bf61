"""How every benchmark ends: its figures as JSON, on the last line and in results/BENCHMARK/NAME.json."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def keep(benchmark: str, machine: str, **figures: Any) -> None:
    """Print the figures of a benchmark on `machine` and write them under its name."""
    about = {"benchmark": benchmark, "machine": machine, "cores": os.cpu_count(), "python": platform.python_version()}
    result = {**about, **figures}
    file = RESULTS / benchmark / f"{machine}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
