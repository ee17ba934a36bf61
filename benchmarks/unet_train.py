"""How many images a second a U-Net is trained on: by Diffusers' example script, by that with caches, and by Limner.

    python benchmarks/unet_train.py --name my-machine --data data/flickr8k
    python benchmarks/unet_train.py --name h100 --data data/flickr8k --size sd15 --precision bf16 --batch-size 16

All three train the same U-Net on the same pictures, in the same precision and batch size, each in a process of its own,
and take turns round by round. What a step of Diffusers' train_text_to_image does is written out here with that script's
defaults, since its examples are no package: pictures are read, resized and turned to pixels, captions to tokens; the
VAE and the text encoder run in the precision of the training and without gradients; noise, timesteps, the U-Net, mean
squared error, gradient clipping, AdamW. "with caches" is that without pictures, VAE and text encoder. Limner runs
`TrainUnet` through the stream, the step and the weight average of its loop, with a process that loads, from the folder
that `limner encode` wrote. Diffusers' script has no loading process by default, and no weight average.

`--size builtin` is the built-in model, `--size sd15` random weights of Stable Diffusion 1.5's sizes, at 512 pixels.
Prints a line for each round and, last, all figures as JSON, with what part of the machine's arithmetic Limner uses and
what its time goes to; the same goes to results/unet_train/NAME.json. Figures by a second of a core leave out the time
that other programs had it; they say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from clip_train import drawn, now, taken, write_dataset
from record import keep
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.flop_counter import FlopCounterMode

SHOWN = 6  # kinds of operators that the profile names
GEMM = 1024  # side of the matrices whose product shows what the machine can do
SECONDS = 2  # in which it may show it
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """What all sides do."""

    folder: Path
    """A dataset folder; in `model` the model, in `latents` the run of `limner encode`."""
    model: str
    side: int
    """Of the pictures, in pixels."""
    batch_size: int
    precision: str


def sd15(folder: Path) -> str:
    """A model folder of Stable Diffusion 1.5's sizes with random weights."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from limner.models.clip import new_tokenizer

    tokenizer = new_tokenizer([], 600)
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=12,
        projection_dim=768,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    blocks = (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return str(folder)


def script(work: Work, *, cached: bool) -> Iterator[None]:
    """Diffusers' train_text_to_image, step by step; `cached` leaves out pictures, VAE and text encoder."""
    import numpy as np
    from diffusers import DDPMScheduler
    from PIL import Image

    from limner.data.dataset import read_training_split
    from limner.models import loading

    records = read_training_split(work.folder, captioned=True)
    unet = loading.load_unet(work.model).to(DEVICE).train()
    dtype = DTYPES[work.precision]
    vae = loading.load_vae(work.model, dtype).to(DEVICE).requires_grad_(False)
    text_encoder, tokenizer = loading.load_text_encoder(work.model, dtype)
    text_encoder = text_encoder.to(DEVICE).requires_grad_(False)
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)

    def pixels_of(path: Path) -> Tensor:
        image = Image.open(path).convert("RGB")
        scale = work.side / min(image.size)
        image = image.resize([max(work.side, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        left, top = ((side - work.side) // 2 for side in image.size)
        image = image.crop((left, top, left + work.side, top + work.side))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    @torch.no_grad()
    def encoded(start: int) -> tuple[Tensor, Tensor]:
        batch = [records[(start + number) % len(records)] for number in range(work.batch_size)]
        pixels = torch.stack([pixels_of(record.path) for record in batch]).to(DEVICE, dtype)
        captions = [record.captions[0] for record in batch]
        room = tokenizer.model_max_length
        ids = tokenizer(captions, max_length=room, padding="max_length", truncation=True, return_tensors="pt").input_ids
        latents = vae.encode(pixels).latent_dist.sample() * vae.config["scaling_factor"]
        return latents, text_encoder(ids.to(DEVICE))[0]

    latents, states = encoded(0)
    seen = 0
    while True:
        if not cached:
            latents, states = encoded(seen)
        seen += work.batch_size
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=DEVICE).long()
        noised = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=work.precision == "bf16"):
            predicted = unet(noised, timesteps, states, return_dict=False)[0]
        loss = mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # which the script shows
        yield


def limner(work: Work) -> Iterator[None]:
    """Limner's training, as its loop does it."""
    from limner.config import TrainUnetConfig
    from limner.stages.train_unet import TrainUnet
    from limner.training import memory, optimizers, processes
    from limner.training.average import WeightAverage
    from limner.training.lanes import Lanes
    from limner.training.task import place, step

    config = TrainUnetConfig(
        data=work.folder / "latents",
        model=work.model,
        out=work.folder / "run",
        batch_size=work.batch_size,
        precision=work.precision,
    )
    memory.keep_freed()
    accelerator = processes.join(None)
    task = TrainUnet(config)
    place(task.network, accelerator)
    optimizer = optimizers.new(task.network, config, task.rates)
    average = WeightAverage(task.network, config.ema_halflife)
    lanes = Lanes.of(accelerator.prepare(task.network), config, accelerator)
    settings = {"rate": config.lr, "seed": config.seed, "config": config, "accelerator": accelerator}
    for batch in task.stream.batches(0, 10**9, config.batch_size, workers=config.workers):
        figures = step(task, lanes, optimizer, batch, **settings)
        figures["loss"].item()  # which the loop looks at
        average.update(config.batch_size, config.images)
        yield


SIDES = {"diffusers": partial(script, cached=False), "with_caches": partial(script, cached=True), "limner": limner}


def arithmetic(work: Work) -> float:
    """FLOP of training on one image: the U-Net forward and back."""
    from limner.models import loading

    unet = loading.load_unet(work.model).to(DEVICE).train()
    side, channels = work.side // 8, unet.config["in_channels"]
    states = torch.randn(1, 77, unet.config["cross_attention_dim"], device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        unet(torch.randn(1, channels, side, side, device=DEVICE), 500, states, return_dict=False)[
            0
        ].square().mean().backward()
    return float(counter.get_total_flops())


def product(dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product: what the machine can do."""
    a, b = torch.randn(2, GEMM, GEMM, device=DEVICE).to(dtype)
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        started = now()
        a @ b
        times.append(now() - started)
    return 2 * GEMM**3 / min(times) / 1e12


def profile(steps: Iterator[None]) -> dict[str, float]:
    """Shares of a step's time by kind of operator, the greatest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if DEVICE.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as found:
        next(steps)
    own = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    times = {event.key: float(getattr(event, own)) for event in found.key_averages()}
    greatest = sorted(times, key=times.__getitem__, reverse=True)[:SHOWN]
    return {name: round(times[name] / sum(times.values()), 3) for name in greatest}


def side(name: str, work: Work, told: Connection) -> None:
    """One of `SIDES` in a process of its own: answers a number of steps with their seconds, on the clock and of all
    cores, and 0 with its profile.
    """
    steps = SIDES[name](work)
    next(steps)
    told.send(None)
    while (count := told.recv()) is not None:
        if count == 0:
            told.send(profile(steps))
            continue
        started, busy = now(), time.process_time()
        for _ in range(count):
            next(steps)
        told.send((now() - started, time.process_time() - busy))


def measure(work: Work, steps: int, rounds: int) -> dict[str, Any]:
    """Images a second of each side, and a second of a core, medians over the rounds; a round before them warms up."""
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for name in SIDES:
        ends[name], other = context.Pipe()
        context.Process(target=side, args=(name, work, other)).start()
        other.close()  # so that a side that fails is noticed
        ends[name].recv()

    def answer(name: str, count: int) -> Any:
        ends[name].send(count)
        return ends[name].recv()

    paces: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for number in range(rounds + 1):
        for name, own in paces.items():
            clock, cores = answer(name, steps)
            if number:
                own.append((steps * work.batch_size / clock, steps * work.batch_size / cores))
        if number:
            shown = "   ".join(f"{name} {own[-1][0]:.2f} images/s ({own[-1][1]:.2f})" for name, own in paces.items())
            print(f"round {number}   {shown}", flush=True)
    shares = answer("limner", 0)
    for end in ends.values():
        end.send(None)
    medians, by_core = (
        {name: round(statistics.median(pace[which] for pace in own), 2) for name, own in paces.items()}
        for which in range(2)
    )
    flop = arithmetic(work)
    reached, able = medians["limner"] * flop / 1e12, {name: product(dtype) for name, dtype in DTYPES.items()}
    return {
        "images_a_second": medians,
        "images_a_second_of_a_core": by_core,
        "ratio": round(medians["limner"] / medians["diffusers"], 2),
        "ratio_of_a_core": round(by_core["limner"] / by_core["diffusers"], 2),
        "ratio_of_caches": round(medians["with_caches"] / medians["diffusers"], 2),
        "gflop_an_image": round(flop / 1e9, 2),
        "tflop_a_second": round(reached, 3),
        "tflop_a_second_of_a_product": {name: round(value, 3) for name, value in able.items()},
        "share_of_a_product": round(reached / able[work.precision], 2),
        "shares": shares,
    }


def main() -> None:
    """Measure, print, and keep the result under the machine's name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the machine, for the file of results")
    parser.add_argument("--data", type=Path, help="dataset folder to train on; pictures are drawn when left out")
    parser.add_argument("--size", choices=["builtin", "sd15"], default="builtin", help="of the model (default builtin)")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step (default 32)")
    parser.add_argument("--steps", type=int, default=4, help="steps a round (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each, after one to warm up (default 5)")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="arithmetic (default fp32)")
    chosen = parser.parse_args()
    from limner.config import EncodeConfig
    from limner.stages import encode

    count = chosen.batch_size * chosen.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder, taken(chosen.data, count) if chosen.data else drawn(folder / "drawn", count))
        side = 128 if chosen.size == "builtin" else 512
        model = "builtin" if chosen.size == "builtin" else sd15(folder / "model")
        encode.run(EncodeConfig(data=folder, vae=model, clip=model, size=side, out=folder / "latents"))
        measured = measure(Work(folder, model, side, chosen.batch_size, chosen.precision), chosen.steps, chosen.rounds)
    keep(
        "unet_train",
        chosen.name,
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        versions={name: version(name) for name in ("limner", "torch", "diffusers", "transformers")},
        **{name: value for name, value in vars(chosen).items() if name not in ("name", "data")},
        data=chosen.data.name if chosen.data else "drawn",
        **measured,
    )


if __name__ == "__main__":
    main()
