"""How many pairs a second Limner and open_clip train a CLIP of ViT-B/32's size on, data loading included.

    python benchmarks/clip_train.py --name my-machine
    python benchmarks/clip_train.py --name my-machine --data data/flickr8k

Each trains in a process of its own, and they take turns: a round of some steps, while the other waits. Both see the
same pictures and captions, each in an order and with an augmentation of its own, and read them as the same tokens. Both
networks are new, of the same shapes, in the same precision, and have the exact GELU of open_clip's ViT-B-32. What a
step takes from a loader is refilled while that step computes, so that a round pays for the data it uses.

open_clip runs its own `open_clip_train.main` with its defaults; what it is told is what both must share. The benchmark
stands between its loop and its loader, and nowhere else. It needs torchvision, whose package refuses to be imported
beside another build of torch for want of two compiled operators. Nothing here calls these; in that case they are
declared, without a body, so that the import passes. Limner runs `TrainClip` with its defaults through the stream, the
step and the weight average of its loop. open_clip has no weight average: the second of the two ratios counts it, the
first does not.

Prints a line for each round and, last, all figures as JSON; the same goes to results/clip_train/NAME.json.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import logging
import multiprocessing
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions, version
from math import isfinite
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from record import keep

from limner.data.dataset import read_training_split

OPEN_CLIP = Path(__file__).parents[1] / "build" / "open_clip"
# In a folder of its own, since Limner's libraries would take up torchvision where they see it.
INSTALL = "pip install --no-deps --target build/open_clip open_clip_torch timm torchvision ftfy wcwidth"
PRECISIONS = {"bf16": "amp_bf16", "fp32": "fp32"}  # Limner's names and open_clip's
SIDE = 224  # of ViT-B/32's pictures
ENTRIES = 49_408  # of its tokenizer, the last of which ends a text
OCTAVES = (4, 8, 16, 32, 64, 128)  # of the noise in a drawn picture, in cells a side
WORDS = (
    "a the two one man woman dog child girl boy group people brown black white red blue young small large in on with "
    "over through near behind is are running jumping playing standing sitting walking holding wearing riding looking "
    "grass water snow field street beach park ball shirt hat bike rock mountain camera crowd fence building"
)

Pairs = list[tuple[Path, str]]  # pictures and captions
Figures = dict[str, float]
Ready = tuple[int, list[list[int]]]  # parameters that are trained, and token ids of all captions


@dataclass(frozen=True)
class Work:
    """What both sides do."""

    folder: Path
    """A dataset folder, with the pairs of all rounds; `pairs.csv` in it holds the same for open_clip."""
    batch_size: int
    steps: int
    """Steps of a round."""
    workers: int
    precision: Literal["bf16", "fp32"]


def drawn(folder: Path, count: int) -> Pairs:
    """Pictures drawn into `folder`, about as hard to decode as photographs, with captions of 8 to 20 words."""
    folder.mkdir()
    pairs = []
    for number in range(count):
        rng = np.random.default_rng(number)
        canvas = np.full((SIDE, SIDE, 3), 128.0)
        for cells in OCTAVES:  # the finer, the fainter
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            smooth = np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=float)
            canvas += (smooth - 128) * 3 / cells**0.7
        path = folder / f"{number:05d}.jpg"
        Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        words = random.Random(number)
        pairs.append((path, " ".join(words.choices(WORDS.split(), k=words.randint(8, 20))) + "."))
    return pairs


def taken(data: Path, count: int) -> Pairs:
    """The first pictures of a dataset folder, each with one of its captions. Ends the benchmark where they are few."""
    records = read_training_split(data, captioned=True)[:count]
    if len(records) < count:
        sys.exit(f"{data} has {len(records)} captioned pictures to train on, but this takes {count}; lower --rounds.")
    return [(r.path.resolve(), r.captions[number % len(r.captions)]) for number, r in enumerate(records)]


def write_dataset(folder: Path, pairs: Pairs) -> None:
    """Write the pairs as Limner reads them, and as open_clip does."""
    rows = [json.dumps({"file_name": str(path), "captions": [caption]}) for path, caption in pairs]
    for split, lines in (("train", rows), ("val", rows[:1])):
        (folder / split).mkdir()
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "dataset.json").write_text("{}\n")
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *pairs])


def now() -> float:
    """Seconds on the clock, once a GPU has done what it was told."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Watch:
    """Seconds of a round by what they went to."""

    def __init__(self, optimizer: Any) -> None:
        self.seconds: dict[str, float] = {}
        self.started = 0.0
        optimizer.register_step_pre_hook(lambda *_: self.start())
        optimizer.register_step_post_hook(lambda *_: self.stop("optimizer"))

    def start(self) -> None:
        """Begin to measure something."""
        self.started = now()

    def stop(self, name: str) -> None:
        """Add what has passed since the start to the seconds of `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + now() - self.started

    def figures(self, seconds: float, steps: int) -> Figures:
        """Seconds a step of a round that took `seconds`: as a whole but for the weight average, and by parts."""
        parts = {name: taken / steps for name, taken in self.seconds.items()}
        self.seconds.clear()
        average = parts.pop("average", 0.0)
        step = seconds / steps - average
        return {"step": step, **parts, "forward_backward": step - sum(parts.values()), "average": average}


def ready(network: Any, ids: Any) -> Ready:
    """What a side says of itself first; `ids` (N, L) are the tokens of all captions."""
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return count, [row[: row.index(ENTRIES - 1) + 1] for row in ids.tolist()]


def in_rounds(pipe: Connection, said: Ready, batches: Iterator[Any], watch: Watch, steps: int) -> Iterator[Any]:
    """Hand on the batches, but wait to be asked before each round, and tell what it took. Ends with the pipe.

    Who takes a batch has done its step by the time of asking for the next.
    """
    pipe.send(said)
    try:
        while pipe.recv():
            started = now()
            for _ in range(steps):
                watch.start()
                batch = next(batches)
                watch.stop("loading")
                yield batch
            pipe.send((watch.figures(now() - started, steps), peak()))
    except EOFError:
        sys.exit()


def peak() -> dict[str, int]:
    """The most bytes that this process has held, and on a GPU its tensors there."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    held = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    return held | ({"peak_gpu_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def open_clip_side(pipe: Connection, work: Work) -> None:
    """open_clip's training, whose loader hands on its batches in rounds."""
    sys.path.append(str(OPEN_CLIP))
    import_torchvision()
    import torch
    from open_clip_train import main as theirs

    logging.disable(logging.WARNING)
    train_one_epoch = theirs.train_one_epoch

    def train(model: Any, data: Any, loss: Any, epoch: int, optimizer: Any, *others: Any, **named: Any) -> None:
        loader = data["train"].dataloader

        class Rounds:
            num_batches, num_samples = loader.num_batches, loader.num_samples

            def __iter__(self) -> Iterator[Any]:
                said = ready(model, loader.dataset.tokenize(loader.dataset.captions))
                return in_rounds(pipe, said, iter(loader), Watch(optimizer), work.steps)

        data["train"].dataloader = Rounds()
        train_one_epoch(model, data, loss, epoch, optimizer, *others, **named)

    theirs.train_one_epoch = train
    options = {
        "model": "ViT-B-32",
        "precision": PRECISIONS[work.precision],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dataset-type": "csv",
        "train-data": work.folder / "pairs.csv",
        "batch-size": work.batch_size,
        "workers": work.workers,
        "logs": work.folder / "logs",
    }
    theirs.main([f"--{name}={value}" for name, value in options.items()])


def import_torchvision() -> None:
    """Import torchvision, even where its compiled part does not fit this torch."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def limner_side(pipe: Connection, work: Work) -> None:
    """Limner's training, as its loop does it."""
    from limner.config import TrainClipConfig
    from limner.stages.train_clip import TrainClip
    from limner.training import optimizers, processes
    from limner.training.average import WeightAverage
    from limner.training.lanes import Lanes
    from limner.training.task import place, step

    write_clip(work.folder / "clip")
    config = TrainClipConfig(
        data=work.folder,
        model=str(work.folder / "clip"),
        out=work.folder / "run",
        batch_size=work.batch_size,
        workers=work.workers,
        precision=work.precision,
    )
    accelerator = processes.join(None)
    task = TrainClip(config)
    place(task.network, accelerator)
    optimizer = optimizers.new(task.network, config, task.rates)
    average = WeightAverage(task.network, config.ema_halflife)
    lanes = Lanes.of(accelerator.prepare(task.network), config, accelerator)
    watch = Watch(optimizer)
    said = ready(lanes.network, task.clip.tokenize([record.captions[0] for record in task.train]))
    batches = task.stream.batches(0, len(task.train), config.batch_size, workers=config.workers)
    settings = {"rate": config.lr, "seed": config.seed, "config": config, "accelerator": accelerator}
    for batch in in_rounds(pipe, said, batches, watch, work.steps):
        figures = step(task, lanes, optimizer, batch, **settings)
        assert all(isfinite(figures[name].item()) for name in ("loss", "gradient"))
        watch.start()
        average.update(config.batch_size, config.images)
        watch.stop("average")


def write_clip(folder: Path) -> None:
    """An untrained CLIPModel of the size of open_clip's ViT-B-32, with the tokenizer that open_clip brings."""
    from tokenizers import pre_tokenizers
    from transformers.models.clip.configuration_clip import CLIPConfig
    from transformers.models.clip.modeling_clip import CLIPModel
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    from limner.models import clip as clips
    from limner.models.loading import quiet

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    packed = (OPEN_CLIP / "open_clip" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")[1 : ENTRIES - 2 * len(letters) - 1]  # after a heading
    merges = [tuple(line.split()) for line in lines]
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {entry: number for number, entry in enumerate([*entries, clips.BEGIN, clips.END])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=clips.LENGTH)
    text = clips.text_settings(tokenizer) | {"hidden_act": "gelu"}
    with quiet():
        network = CLIPModel(CLIPConfig(text_config=text, vision_config={"hidden_act": "gelu"}))
        clips.Clip(network, tokenizer, clips.OPENAI).save(folder)


SIDES = {"open_clip": open_clip_side, "limner": limner_side}


def run(side: str, pipe: Connection, work: Work) -> None:
    """All that a side's process does."""
    multiprocessing.set_start_method(None, force=True)  # loaders start their own processes as they do by default
    SIDES[side](pipe, work)


def start(side: str, work: Work) -> tuple[Connection, Ready]:
    """Start a side. -> the pipe to it, and what it says first."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=run, args=(side, theirs, work)).start()
    theirs.close()
    return ours, receive(side, ours)


def receive(side: str, pipe: Connection) -> Any:
    """What a side says next; ends the benchmark where its process has failed."""
    try:
        return pipe.recv()
    except EOFError:
        sys.exit(f"The process of {side} failed; see above.")


def turns(pipes: dict[str, Connection]) -> dict[str, tuple[Figures, dict[str, int]]]:
    """A round of each side, one after the other."""
    results = {}
    for side, pipe in pipes.items():
        pipe.send("go")
        results[side] = receive(side, pipe)
    return results


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """Figures of each side, medians over the rounds, and how much faster Limner is; a round before them warms up."""
    pipes, said = {}, {}
    for side in SIDES:
        pipes[side], said[side] = start(side, work)
    parameters, tokens = said["limner"]
    assert said["open_clip"] == (parameters, tokens), "they don't train as many parameters on the same tokens"
    turns(pipes)
    results = []
    for number in range(1, rounds + 1):
        results.append(turns(pipes))
        theirs, ours = (results[-1][side][0]["step"] for side in SIDES)
        print(f"round {number}   open_clip {theirs:6.2f} s a step   limner {ours:6.2f}   ratio {theirs / ours:.2f}")
    for pipe in pipes.values():
        pipe.close()
    sides: dict[str, Any] = {}
    for side in SIDES:
        seen = [result[side][0] for result in results]
        medians = {name: round(statistics.median(figures[name] for figures in seen), 3) for name in seen[0]}
        pace = {"pairs_a_second": round(work.batch_size / medians["step"], 2), "seconds_a_step": medians}
        sides[side] = pace | results[-1][side][1]
    theirs, ours = (sides[side]["seconds_a_step"] for side in SIDES)
    return {
        "parameters": parameters,
        "tokens_a_caption": round(statistics.mean(map(len, tokens)), 1),
        **sides,
        "ratio": round(theirs["step"] / ours["step"], 2),
        "ratio_with_average": round(theirs["step"] / (ours["step"] + ours["average"]), 2),
    }


def main() -> None:
    """Measure, print, and keep the result under the machine's name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the machine, for the file of results")
    parser.add_argument("--data", type=Path, help="dataset folder to train on; pictures are drawn when left out")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs a step (default 32)")
    parser.add_argument("--steps", type=int, default=2, help="steps a round (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each, after one to warm up (default 5)")
    parser.add_argument("--workers", type=int, default=1, help="processes that load the data for each (default 1)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="arithmetic (default bf16)")
    chosen = parser.parse_args()
    if not OPEN_CLIP.exists():
        print(json.dumps({"benchmark": "clip_train", "not_measured": f"open_clip is missing; {INSTALL}"}))
        return
    count = chosen.batch_size * chosen.steps * (chosen.rounds + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder, taken(chosen.data, count) if chosen.data else drawn(folder / "drawn", count))
        work = Work(folder, chosen.batch_size, chosen.steps, chosen.workers, chosen.precision)
        measured = measure(work, chosen.rounds)
    (theirs,) = distributions(name="open_clip_torch", path=[str(OPEN_CLIP)])
    keep(
        "clip_train",
        chosen.name,
        versions={"open_clip": theirs.version} | {n: version(n) for n in ("limner", "torch", "transformers")},
        **{name: value for name, value in vars(chosen).items() if name not in ("name", "data")},
        data=chosen.data.name if chosen.data else "drawn",
        **measured,
    )


if __name__ == "__main__":
    main()
