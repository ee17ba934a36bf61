"""The one training loop. What is trained, on what, and how well it does is a `Task`; the rest is here."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from torch import Tensor, nn

from limner.artifacts import Run, atomic_folder
from limner.config import TrainConfig
from limner.errors import RunError
from limner.training import checkpoints
from limner.training.average import WeightAverage
from limner.training.progress import progress
from limner.training.stream import Stream

log = logging.getLogger(__name__)

COOLDOWN = 0.3  # share of the run at whose end the learning rate falls


class Task(Protocol):
    """One training: a network, a stream of examples, a loss, and how its result is judged and saved."""

    network: nn.Module
    """What is trained; its forward is what `loss` calls."""
    stream: Stream
    """Its examples."""

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and figures worth logging."""

    def validate(self, samples: Path) -> dict[str, float]:
        """Judge the network as it is; `loss` in the answer chooses the best checkpoint. Writes pictures to look at."""

    def save(self, folder: Path) -> None:
        """Write the network as part of a Diffusers model folder."""


def train(task: Task, config: TrainConfig, run: Run) -> dict[str, Any]:
    """Train until `config.images` were seen, resuming from the newest checkpoint; write the result to `run.model`.

    Returns facts for the manifest. Raises RunError when the loss stops being a number; the last good checkpoint
    is left as it is.
    """
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        log_with="tensorboard" if is_tensorboard_available() else None,
        project_dir=run.folder,
    )
    task.network.to(accelerator.device)
    optimizer = torch.optim.AdamW(_groups(task.network, config.weight_decay), lr=config.lr, betas=(0.9, 0.99))
    average = WeightAverage(task.network, config.ema_halflife)
    facts = checkpoints.load_newest(run.checkpoints, task.network, average, optimizer) or {"images": 0}
    network, optimizer = accelerator.prepare(task.network, optimizer)
    if config.compile:
        network = torch.compile(network)
    accelerator.init_trackers("tensorboard")
    journal = Journal(run.folder / "events.jsonl", accelerator)
    seen = facts["images"]
    batches = task.stream.batches(
        seen,
        config.images,
        config.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=config.workers,
    )

    with progress("images", config.images, done=seen) as advance:
        for batch in batches:
            rate = learning_rate(seen, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            moved = {name: value.to(accelerator.device) for name, value in batch.items()}
            with accelerator.autocast():
                loss, figures = task.loss(network, moved)
            if not torch.isfinite(loss):
                raise RunError(
                    f"The loss became {loss.item()} after {seen} images; the last good checkpoint is kept. "
                    f"Lower lr ({config.lr}) and start in a new folder from --model."
                )
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(network.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            before, seen = seen, seen + config.batch_size
            average.update(config.batch_size, seen)
            advance(config.batch_size)

            last = seen >= config.images
            if last or _crossed(before, seen, config.log_every):
                journal.write(seen, {"loss": loss, "lr": rate, "gradient": norm, **figures})
            if last or _crossed(before, seen, config.validate_every):
                facts = _validate(task, average, run, seen, facts, journal)
            if last or _crossed(before, seen, config.checkpoint_every):
                _checkpoint(accelerator, task, average, optimizer, run, config, {**facts, "images": seen})

    with average.applied():
        if accelerator.is_main_process:
            with atomic_folder(run.model) as folder:
                task.save(folder)
    accelerator.end_training()
    return {"images": seen, "seed": config.seed, "validation": facts.get("validation")}


def learning_rate(seen: int, config: TrainConfig) -> float:
    """Linear rise over `warmup` images, then constant, then a linear fall to `final_lr` over the last 30 %."""
    rise = min(1.0, (seen + config.batch_size) / max(config.warmup, 1))
    left = (config.images - seen) / (COOLDOWN * config.images)
    return config.lr * rise * (config.final_lr + (1 - config.final_lr) * min(1.0, left))


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for matrices and kernels; none for biases, gains and scalars."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def _crossed(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def _validate(
    task: Task, average: WeightAverage, run: Run, seen: int, facts: dict[str, Any], journal: Journal
) -> dict[str, Any]:
    folder = run.folder / "samples" / f"{seen:09d}"
    folder.mkdir(parents=True, exist_ok=True)
    task.network.eval()
    with average.applied(), torch.no_grad():
        figures = task.validate(folder)
    task.network.train()
    journal.write(seen, {f"validation/{name}": value for name, value in figures.items()})
    best = min(facts.get("best", math.inf), figures["loss"])
    return {**facts, "validation": figures, "best": best}


def _checkpoint(
    accelerator: Accelerator,
    task: Task,
    average: WeightAverage,
    optimizer: torch.optim.Optimizer,
    run: Run,
    config: TrainConfig,
    facts: dict[str, Any],
) -> None:
    if not accelerator.is_main_process:
        return
    checkpoints.save(run.checkpoints / f"{facts['images']:09d}", task.network, average, optimizer, facts)
    checkpoints.prune(run.checkpoints, config.keep_checkpoints)


class Journal:
    """Figures over the training: one JSON object a line in `events.jsonl`, and TensorBoard where it is installed."""

    def __init__(self, file: Path, accelerator: Accelerator) -> None:
        self.file = file
        self.accelerator = accelerator
        self.started = time.monotonic()
        self.first: int | None = None

    def write(self, seen: int, figures: dict[str, Any]) -> None:
        """Add figures, scalars by name, at `seen` images."""
        if self.first is None:
            self.first, self.started = seen, time.monotonic()
        seconds = time.monotonic() - self.started
        values = {name: float(value) for name, value in figures.items()}
        if seen > self.first:
            values["images_per_second"] = (seen - self.first) / seconds
        self.accelerator.log(values, step=seen)
        if self.accelerator.is_main_process:
            with self.file.open("a") as file:
                file.write(json.dumps({"images": seen, "seconds": round(seconds, 1), **values}) + "\n")
