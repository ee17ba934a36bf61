"""How long until something is seen: the help page, the import of torch, and the first step and picture of a
cold process, also with OpenVINO, where that is installed and the networks were converted before.

    python benchmarks/startup.py --name my-machine

Prints a line for each figure and, last, all of them as JSON; the same goes to results/startup/NAME.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from record import keep

import limner

BUILTIN = Path(limner.__file__).parent / "builtin" / "model_index.json"
PROMPT = "A golden retriever playing in a field."
LIMNER = [sys.executable, "-c", "from limner.cli import main; main()"]


def seconds(command: list[str], **options: Any) -> float:
    """Wall time of a command; ends the benchmark where the command fails."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    taken = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stderr}")
    return taken


def generate(*flags: str) -> float:
    """Wall time from an empty process to a PNG of the built-in model with its default settings."""
    with tempfile.TemporaryDirectory() as folder:
        taken = seconds([*LIMNER, "generate", PROMPT, "--seed", "7", "--out", folder, *flags], stdin=subprocess.DEVNULL)
        if not list(Path(folder).glob("**/*.png")):
            sys.exit("limner generate ended well, but there is no PNG.")
    return taken


def first_step() -> float:
    """Wall time from an empty process to the end of the built-in model's first denoising step."""
    script = f"import limner, os; limner.load()({PROMPT!r}, seed=7, on_step=lambda _: os._exit(0))"
    return seconds([sys.executable, "-c", script])


def measure(repeats: int) -> dict[str, float | None]:
    """Each figure in seconds: the median of `repeats`; None for what can't be measured here."""
    figures: dict[str, float | None] = {}
    for name, take in (
        ("help", lambda: seconds([*LIMNER, "--help"])),
        ("import_torch", lambda: seconds([sys.executable, "-c", "import torch"])),
        ("first_step", first_step),
        ("first_picture", generate),
        ("first_picture_openvino", lambda: generate("--engine", "openvino")),
    ):
        if name.startswith("first") and not BUILTIN.exists():
            print(f"{name.replace('_', ' '):<22} not measured: no built-in model; make it with recipes/builtin")
            figures[name] = None
            continue
        if "openvino" in name:
            if find_spec("openvino") is None:
                continue
            take()  # which converts and keeps the networks
        times = sorted(take() for _ in range(repeats))
        figures[name] = round(statistics.median(times), 3)
        print(f"{name.replace('_', ' '):<22} {figures[name]:7.3f} s   (from {times[0]:.3f} to {times[-1]:.3f})")
    return figures


def main() -> None:
    """Measure, print, and keep the result under the machine's name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the machine, for the file of results")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is measured (default 5)")
    arguments = parser.parse_args()
    figures = measure(arguments.repeats)
    keep(
        "startup",
        arguments.name,
        limner=limner.__version__,
        repeats=arguments.repeats,
        seconds=figures,
    )


if __name__ == "__main__":
    main()
