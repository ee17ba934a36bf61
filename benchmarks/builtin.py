"""What a picture of the built-in model costs: from an empty process, of a warm model by steps, and in memory.

    python benchmarks/builtin.py --name my-machine [--model FOLDER]

A cold picture is `limner generate` with the model's own settings, and takes turns with a process that only imports
torch and the classes that drawing needs, as any program must. Memory is the most that `limner generate` held.

Prints a line for each figure and, last, all of them as JSON; the same goes to results/builtin/NAME.json.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from record import keep
from startup import LIMNER, PROMPT, seconds

import limner

IMPORTS = """
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
"""
STEPS = (1, 2, 4, 8, 20)


class Taken(NamedTuple):
    """Seconds by the clock, and of all processors together, which tell less of what else the machine did."""

    wall: float
    processor: float


def cold(model: str, repeats: int) -> tuple[dict[str, Taken], int]:
    """The imports alone and a picture from an empty process, medians; and the MiB that the latter held at most."""
    taken: dict[str, list[Taken]] = {"imports": [], "cold": []}
    with tempfile.TemporaryDirectory() as out:
        draw = [*LIMNER, "generate", PROMPT, "--model", model, "--out", out]
        for _ in range(repeats):
            for name, command in (("imports", [sys.executable, "-c", IMPORTS]), ("cold", draw)):
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                wall = seconds(command, stdin=subprocess.DEVNULL)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                taken[name].append(Taken(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1 if sys.platform == "linux" else 1024)  # KiB
    return {name: medians(some) for name, some in taken.items()}, round(most / 1024)


def warm(model: str, repeats: int) -> dict[str, Taken]:
    """A picture of a model that has drawn before, by steps: medians over rounds in which all take turns."""
    painter = limner.load(model)
    taken: dict[str, list[Taken]] = {f"{steps} steps": [] for steps in STEPS}
    for number in range(repeats + 1):
        for steps, some in zip(STEPS, taken.values()):
            started, begun = time.perf_counter(), time.process_time()
            painter(PROMPT, seed=number, steps=steps)
            some.append(Taken(time.perf_counter() - started, time.process_time() - begun))
    return {name: medians(some[1:]) for name, some in taken.items()}


def medians(taken: Sequence[Taken]) -> Taken:
    """Of both kinds of seconds, to the millisecond."""
    return Taken(*(round(statistics.median(some), 3) for some in zip(*taken)))


def main() -> None:
    """Measure, print, and keep the result under the machine's name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the machine, for the file of results")
    parser.add_argument("--model", default="builtin", help="another model folder (default builtin)")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is measured (default 5)")
    given = parser.parse_args()
    found, mib = cold(given.model, given.repeats)
    found |= warm(given.model, given.repeats)
    for name, (wall, processor) in found.items():
        print(f"{name:<8} {wall:7.3f} s, {processor:7.3f} s of processor")
    print(f"memory   {mib:7,} MiB")
    keep(
        "builtin",
        given.name,
        limner=limner.__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        repeats=given.repeats,
        seconds={name: taken.wall for name, taken in found.items()},
        cpu_seconds={name: taken.processor for name, taken in found.items()},
        peak_mib=mib,
    )


if __name__ == "__main__":
    main()
