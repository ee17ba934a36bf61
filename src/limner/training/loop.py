"""The one training loop. What is trained, on what, and how well it does is a `Task`; the rest is here."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from limner.artifacts import Run, atomic_folder
from limner.config import TrainConfig
from limner.errors import RunError
from limner.progress import progress
from limner.training import checkpoints
from limner.training.average import WeightAverage
from limner.training.journal import Journal
from limner.training.stream import Stream

log = logging.getLogger(__name__)

COOLDOWN = 0.3  # share of the run at whose end the learning rate falls
TIMED_STEPS = 2  # of --dry-run, after one to warm up

C = TypeVar("C", bound=TrainConfig)


class Task(Protocol):
    """One training: a network, a stream of examples, a loss, and how its result is judged and saved."""

    network: nn.Module
    """What is trained; its forward is what `loss` calls."""
    stream: Stream
    """Its examples."""
    parents: dict[str, str]
    """What the result is made from: the sha256 of data and models by role, for the manifest."""

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and figures worth logging."""

    def validate(self, samples: Path) -> dict[str, float]:
        """Judge the network as it is; `loss` in the answer chooses the best checkpoint. Writes pictures to look at."""

    def save(self, folder: Path) -> None:
        """Write the network as part of a Diffusers model folder."""


def run_training(make: Callable[[C], Task], config: C) -> Path:
    """Train what `make` builds, going on where a run was stopped; a finished run is left as it is. -> the run folder.

    Raises what `make` raises before anything is written, and RunError.
    """
    started = time.time()
    task = _build(make, config)
    run = Run.open(config.out, config, task.parents)
    if run.finished and run.manifest["images"] >= config.images:
        print(f"Nothing to do: {run.folder} is finished; raise --images to go on.")
        return run.folder
    run.finish(started=started, **_train(task, config, run))
    print(run.model)
    return run.folder


def plan_training(make: Callable[[C], Task], config: C) -> dict[str, Any]:
    """What `run_training` would do: sizes, and the time as a few steps on this machine took. Nothing is written."""
    task = _build(make, config)
    accelerator = _accelerator(None)
    task.network.to(accelerator.device)
    batches = task.stream.batches(0, (TIMED_STEPS + 1) * config.batch_size, config.batch_size)
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        if number == 1:
            started = time.perf_counter()
        with _arithmetic(config, accelerator):
            loss, _ = task.loss(task.network, _moved(batch, accelerator.device))
        loss.backward()
    rate = TIMED_STEPS * config.batch_size / (time.perf_counter() - started)
    count = sum(p.numel() for p in task.network.parameters() if p.requires_grad)
    return {
        "trains": f"{count / 1e6:.1f} M parameters in {config.precision} on {accelerator.device}",
        "examples": f"{task.stream.length:,}, each seen about {config.images / task.stream.length:.1f} times",
        "steps": f"{math.ceil(config.images / config.batch_size):,} of {config.batch_size} images",
        "memory": f"{count * 20 / 1e6:,.0f} MB for weights, gradients, AdamW and average, besides activations",
        "checkpoint": f"{count * 16 / 1e6:,.0f} MB each, {config.keep_checkpoints} and the best are kept",
        "time": f"{config.images / rate / 60:,.0f} minutes at {rate:.1f} images/s, without validation",
        "out": config.out,
    }


def _build(make: Callable[[C], Task], config: C) -> Task:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # the first weights of a new network
    return make(config)


def _accelerator(folder: Path | None) -> Accelerator:
    # Its own mixed precision could not differ between two trainings of a process; `_arithmetic` is in its place.
    return Accelerator(mixed_precision="no", log_with="tensorboard" if folder else None, project_dir=folder)


def _arithmetic(config: TrainConfig, accelerator: Accelerator) -> torch.autocast:
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _train(task: Task, config: TrainConfig, run: Run) -> dict[str, Any]:
    """Train until `config.images` were seen, resuming from the newest checkpoint; write the result to `run.model`.

    Returns facts for the manifest. Raises RunError when the loss stops being a number; the last good checkpoint
    is left as it is.
    """
    accelerator = _accelerator(run.folder)
    # What tensor cores want for convolutions; on CPU it makes no difference (docs/experiments.md).
    task.network.to(accelerator.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    task.network.train()
    optimizer = torch.optim.AdamW(_groups(task.network, config.weight_decay), lr=config.lr, betas=(0.9, 0.99))
    average = WeightAverage(task.network, config.ema_halflife)
    facts = checkpoints.load_newest(run.checkpoints, task.network, average, optimizer) or {"images": 0}
    network, optimizer = accelerator.prepare(task.network, optimizer)
    if config.compile:
        network = torch.compile(network)
    journal = Journal(run.folder, accelerator)
    seen = facts["images"]
    batches = task.stream.batches(
        seen,
        config.images,
        config.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=config.workers,
    )

    with progress("images", config.images, done=seen) as advance, closing(batches):
        for batch in batches:
            rate = learning_rate(seen, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(config.seed + seen)  # for dropout, if the network has any
            with _arithmetic(config, accelerator):
                loss, figures = task.loss(network, _moved(batch, accelerator.device))
            _refuse_nan("loss", loss, seen, config)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(network.parameters(), config.clip_norm)
            _refuse_nan("gradient", norm, seen, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            before, seen = seen, seen + config.batch_size
            average.update(config.batch_size, seen)
            advance(config.batch_size)

            last = seen >= config.images
            if last or _crossed(before, seen, config.log_every):
                journal.write(seen, {"loss": loss, "lr": rate, "gradient": norm, **figures})
            best = False
            if last or _crossed(before, seen, config.validate_every):
                judged = _validate(task, average, run.samples / f"{seen:09d}")
                journal.write(seen, {f"validation/{name}": value for name, value in judged.items()})
                best = judged["loss"] < facts.get("best", math.inf)
                facts = {"validation": judged, "best": min(facts.get("best", math.inf), judged["loss"])}
            if accelerator.is_main_process and (best or last or _crossed(before, seen, config.checkpoint_every)):
                folder = run.checkpoints / f"{seen:09d}"
                checkpoints.save(folder, task.network, average, optimizer, {**facts, "images": seen})
                checkpoints.prune(run.checkpoints, config.keep_checkpoints, best=folder if best else None)

    task.network.eval()
    if accelerator.is_main_process:
        with average.applied(), atomic_folder(run.model) as folder:
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


def _refuse_nan(what: str, value: Tensor, seen: int, config: TrainConfig) -> None:
    if not torch.isfinite(value):
        raise RunError(
            f"The {what} became {value.item()} after {seen} images; the last good checkpoint is kept. "
            f"Lower lr ({config.lr}) and start in a new folder."
        )


def _validate(task: Task, average: WeightAverage, samples: Path) -> dict[str, float]:
    samples.mkdir(parents=True, exist_ok=True)
    task.network.eval()
    with average.applied(), torch.no_grad():
        figures = task.validate(samples)
    task.network.train()
    return figures
