"""Seconds a picture takes: by Diffusers as its README shows it, by Diffusers in bf16, by OpenVINO, and by Limner.

    python benchmarks/generate.py --name my-machine
    python benchmarks/generate.py --name my-machine --size sd15 --pixels 256 --steps 4 --sides "diffusers fp32" limner

All draw with the same weights, prompt, seed, steps, guidance and size, each in a process of its own, and take turns
picture by picture. In one process they would slow each other: once there are more threads than cores, OpenMP's wait in
another way. "openvino", where that is installed, is networks of fixed shapes, exported as `limner models export` does,
in Limner's own denoising loop; "limner openvino" is `--engine openvino`. Both compute in bf16 where Limner does.
`--size sd15` is random weights of Stable Diffusion 1.5's sizes. On a GPU, sides are Diffusers and Limner eager and
compiled (`--compile`), for each of `--batch` pictures at once.

Prints a line for each side and, last, all figures as JSON; the same goes to results/generate/NAME.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from record import keep
from unet_train import sd15

import limner
from limner.generation import openvino, setup
from limner.models.loading import BUILTIN

PROMPT, SEED, GUIDANCE = "A golden retriever playing in a field.", 7, 5.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Draw = Callable[[], np.ndarray]
"""Draws pictures (N, H, W, 3)."""


def diffusers_side(folder: str, dtype: torch.dtype, chosen: argparse.Namespace, *, compiled: bool = False) -> Draw:
    """Diffusers' pipeline."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune", fullgraph=True)

    def draw() -> np.ndarray:
        drawn = pipeline(
            [PROMPT] * chosen.batch,
            num_inference_steps=chosen.steps,
            guidance_scale=GUIDANCE,
            width=chosen.pixels,
            height=chosen.pixels,
            generator=[torch.Generator().manual_seed(SEED + i) for i in range(chosen.batch)],
        )
        return np.stack([np.asarray(image) for image in drawn.images])

    return draw


def limner_side(
    folder: str, chosen: argparse.Namespace, *, engine: Any = "torch", reuse: int = 1, compiled: bool = False
) -> Draw:
    """Limner, as its Python function draws."""
    model = limner.load(folder, engine=engine)
    if compiled:
        model.painter.taken_apart.step = torch.compile(  # type: ignore[attr-defined]
            model.painter.taken_apart.step,  # type: ignore[attr-defined]
            mode="max-autotune",
            fullgraph=True,
        )

    def draw() -> np.ndarray:
        settings = {"steps": chosen.steps, "guidance": GUIDANCE, "size": chosen.pixels, "n": chosen.batch}
        settings["reuse"] = reuse
        drawn = model(PROMPT, seed=SEED, batch_size=chosen.batch, **settings)
        return np.stack([np.asarray(image) for image in drawn.images])

    return draw


def openvino_side(folder: str, exported: Path, chosen: argparse.Namespace) -> Draw:
    """OpenVINO's networks in Limner's loop: as fast as their own pipeline, and with the same noise."""
    from limner.generation import engine
    from limner.models import export, loading

    core = export.import_openvino().Core()
    shape: tuple[int, ...] = ()
    requests = {}
    for network in export.networks(folder, (chosen.pixels, chosen.pixels), guided=True):
        file = export.write(network, "openvino", exported)
        precision = openvino.HINTS[setup.choose(DEVICE).precision]
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        requests[network.name] = core.compile_model(str(file), "CPU", settings).create_infer_request()
        if network.name == "unet":
            shape = tuple(network.inputs["latents"].shape[1:])
    tokenizer, scheduler = loading.load_tokenizer(folder), loading.load_scheduler(folder)

    def call(name: str, **inputs: Any) -> torch.Tensor:
        (found,) = requests[name].infer({key: value.numpy() for key, value in inputs.items()}).values()
        return torch.from_numpy(found)

    class UNet:
        def __init__(self) -> None:
            self.config: dict[str, Any] = {}

        def __call__(self, latents: Any, timestep: Any, encoder_hidden_states: Any, **_: Any) -> tuple[torch.Tensor]:
            return (call("unet", latents=latents, timestep=timestep.float(), states=encoder_hidden_states),)

    def encode(prompt: str) -> torch.Tensor:
        ids = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return call("text_encoder", input_ids=ids).clone()

    def draw() -> np.ndarray:
        states, negative_states = encode(PROMPT), encode("")
        latents = engine.denoise(
            UNet(),
            scheduler,
            engine.initial_noise([SEED], shape),
            states,
            steps=chosen.steps,
            guidance=GUIDANCE,
            negative_states=negative_states,
        )
        return np.asarray(engine.to_images(call("vae_decoder", latents=latents))[0])[None]

    return draw


class Side:
    """A process that draws when it is asked to."""

    def __init__(self, load: Callable[[], Draw], threads: int | None) -> None:
        """Begin it, and wait until it has loaded."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        context.Process(target=draw_when_asked, args=(theirs, load, threads), daemon=True).start()
        theirs.close()
        self.connection.recv()

    def draw(self) -> tuple[float, float, np.ndarray]:
        """Seconds, seconds of processor, and what was drawn."""
        self.connection.send(None)
        drawn: tuple[float, float, np.ndarray] = self.connection.recv()
        return drawn


def draw_when_asked(connection: Connection, load: Callable[[], Draw], threads: int | None) -> None:
    """Load, say so, and then draw at each word, until who asks has ended."""
    if threads:
        torch.set_num_threads(threads)
    draw = load()
    connection.send(None)
    with suppress(EOFError):
        while True:
            connection.recv()
            started, begun = time.perf_counter(), time.process_time()
            pictures = draw().astype(int)
            connection.send((time.perf_counter() - started, time.process_time() - begun, pictures))


def sides(folder: str, exported: Path, chosen: argparse.Namespace) -> dict[str, Side]:
    """All sides that this machine has and that are wanted, loaded."""
    known: dict[str, Callable[[], Draw]] = {
        "diffusers fp32": partial(diffusers_side, folder, torch.float32, chosen),
        "diffusers bf16": partial(diffusers_side, folder, torch.bfloat16, chosen),
        "limner": partial(limner_side, folder, chosen),
        "limner reuse 2": partial(limner_side, folder, chosen, reuse=2),
    }
    if chosen.compile:
        known["diffusers bf16 compiled"] = partial(diffusers_side, folder, torch.bfloat16, chosen, compiled=True)
        known["limner compiled"] = partial(limner_side, folder, chosen, compiled=True)
    if DEVICE.type == "cpu" and chosen.batch == 1 and find_spec("openvino"):
        os.environ["LIMNER_CACHE"] = str(exported / "cache")
        known["openvino"] = partial(openvino_side, folder, exported, chosen)
        known["limner openvino"] = partial(limner_side, folder, chosen, engine="openvino")
        known["limner openvino reuse 2"] = partial(limner_side, folder, chosen, engine="openvino", reuse=2)
    return {name: Side(load, chosen.threads) for name, load in known.items() if name in (chosen.sides or known)}


def measure(found: dict[str, Side], chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds and CPU seconds a picture, medians over the rounds; a round before them warms up."""
    wall: dict[str, list[float]] = {name: [] for name in found}
    busy: dict[str, list[float]] = {name: [] for name in found}
    pictures = {}
    for number in range(chosen.rounds + 1):
        for name, side in found.items():
            seconds, cpu_seconds, pictures[name] = side.draw()
            if number:
                wall[name].append(seconds / chosen.batch)
                busy[name].append(cpu_seconds / chosen.batch)
    result = SimpleNamespace(seconds={}, cpu_seconds={}, away={})
    for name in found:
        result.seconds[name] = round(statistics.median(wall[name]), 4)
        result.cpu_seconds[name] = round(statistics.median(busy[name]), 4)
        result.away[name] = round(float(np.abs(pictures[name] - next(iter(pictures.values()))).mean()), 3)
        print(
            f"{name:<24} {result.seconds[name]:8.3f} s a picture, {result.cpu_seconds[name]:8.3f} s of processor, "
            f"{result.away[name]:.2f} of 255 from the first"
        )
    ratios = {
        ours: {name: round(value / result.seconds[ours], 2) for name, value in result.seconds.items()}
        for ours in found
        if ours.startswith("limner")
    }
    return {**vars(result), "times": ratios}


def main() -> None:
    """Measure, print, and keep the result under the machine's name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the machine, for the file of results")
    parser.add_argument("--size", choices=["builtin", "sd15"], default="builtin", help="of the model (default builtin)")
    parser.add_argument("--model", type=Path, help="folder for the model of sd15, made there or kept from another call")
    parser.add_argument("--pixels", type=int, help="a side of the pictures (default 128, or 256 of sd15)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    parser.add_argument("--rounds", type=int, default=5, help="pictures of each, after one to warm up (default 5)")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (default 1)")
    parser.add_argument("--threads", type=int, help="threads of all sides (default torch's)")
    parser.add_argument("--sides", nargs="+", help="those to measure (default all)")
    parser.add_argument("--compile", action="store_true", help="also compiled with max-autotune")
    chosen = parser.parse_args()
    chosen.pixels = chosen.pixels or (128 if chosen.size == "builtin" else 256)
    with tempfile.TemporaryDirectory() as name:
        folder = BUILTIN if chosen.size == "builtin" else chosen.model or Path(name) / "model"
        if not folder.exists():
            sd15(folder)
        measured = measure(sides(str(folder), Path(name), chosen), chosen)
    keep(
        "generate",
        chosen.name,
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        threads=chosen.threads or torch.get_num_threads(),
        versions={name: version(name) for name in ("limner", "torch", "diffusers", "transformers")},
        **{name: value for name, value in vars(chosen).items() if name not in ("name", "threads", "model")},
        **measured,
    )


if __name__ == "__main__":
    main()
