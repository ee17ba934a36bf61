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


def cold(model: str, repeats: int) -> dict[str, float]:
    """Seconds of the imports alone and of a picture from an empty process, medians; and MiB of the latter."""
    times: dict[str, list[float]] = {"imports": [], "cold": []}
    with tempfile.TemporaryDirectory() as out:
        draw = [*LIMNER, "generate", PROMPT, "--model", model, "--out", out]
        for _ in range(repeats):
            times["imports"].append(seconds([sys.executable, "-c", IMPORTS]))
            times["cold"].append(seconds(draw, stdin=subprocess.DEVNULL))
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1 if sys.platform == "linux" else 1024)  # KiB
    return {name: round(statistics.median(taken), 3) for name, taken in times.items()} | {"mib": round(most / 1024)}


def warm(model: str, repeats: int) -> dict[str, float]:
    """Seconds of a picture of a model that has drawn before, by steps: medians over rounds in which all take turns."""
    painter = limner.load(model)
    times: dict[int, list[float]] = {steps: [] for steps in STEPS}
    for number in range(repeats + 1):
        for steps, taken in times.items():
            started = time.perf_counter()
            painter(PROMPT, seed=number, steps=steps)
            taken.append(time.perf_counter() - started)
    return {str(steps): round(statistics.median(taken[1:]), 3) for steps, taken in times.items()}


def main() -> None:
    """Measure, print, and keep the result under the machine's name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the machine, for the file of results")
    parser.add_argument("--model", default="builtin", help="another model folder (default builtin)")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is measured (default 5)")
    given = parser.parse_args()
    first, drawn = cold(given.model, given.repeats), warm(given.model, given.repeats)
    print(f"imports  {first['imports']:7.3f} s")
    print(
        f"cold     {first['cold']:7.3f} s, {first['cold'] - first['imports']:.3f} s more than that; {first['mib']} MiB"
    )
    for steps, taken in drawn.items():
        print(f"{steps:>2} steps {taken:7.3f} s")
    keep(
        "builtin",
        given.name,
        limner=limner.__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        repeats=given.repeats,
        seconds={"imports": first["imports"], "cold": first["cold"], "warm": drawn},
        peak_mib=first["mib"],
    )


if __name__ == "__main__":
    main()
