"""How long `limner prepare` takes for the 8,000 photographs of Flickr8k, and when there is nothing left to do.

    python benchmarks/prepare.py --name my-machine --source folder/of/the/zips

Prints a line for each figure and, last, all of them as JSON; the same goes to results/prepare/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import keep

import limner

FLICKR8K = Path(__file__).parents[2] / "shared" / "data" / "flickr8k"
LIMNER = [sys.executable, "-c", "from limner.cli import main; main()"]


def prepare(source: Path, out: Path) -> float:
    """Wall time of the command; ends the benchmark where the command fails."""
    command = [*LIMNER, "prepare", "flickr8k", "--source", str(source), "--out", str(out)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stderr}")
    return taken


def measure(source: Path, repeats: int) -> tuple[dict[str, float], int]:
    """Each figure in seconds, the median of `repeats`, and the number of pictures in the dataset."""
    times: dict[str, list[float]] = {"prepare": [], "again": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "data"
            for taken in times.values():
                taken.append(prepare(source, out))
            pictures = sum(json.loads((out / "dataset.json").read_text())["counts"].values())
    figures = {name: round(statistics.median(taken), 2) for name, taken in times.items()}
    for name, taken in times.items():
        print(f"{name:<10} {figures[name]:7.2f} s   (from {min(taken):.2f} to {max(taken):.2f})")
    return figures, pictures


def main() -> None:
    """Measure, print, and keep the result under the machine's name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the machine, for the file of results")
    parser.add_argument("--source", type=Path, default=FLICKR8K, help="the folder that holds Flickr8k")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is measured (default 3)")
    arguments = parser.parse_args()
    if not arguments.source.exists():
        print(json.dumps({"benchmark": "prepare", "not_measured": "Flickr8k is missing; name it with --source"}))
        return
    figures, pictures = measure(arguments.source, arguments.repeats)
    keep(
        "prepare",
        arguments.name,
        limner=limner.__version__,
        repeats=arguments.repeats,
        pictures=pictures,
        seconds=figures,
        pictures_a_second=round(pictures / figures["prepare"]),
    )


if __name__ == "__main__":
    main()
