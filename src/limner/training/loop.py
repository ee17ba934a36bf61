"""The one training loop. What is trained, on what, and how well it does is a `Task`; the rest is here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from limner.artifacts import Run, atomic_folder
from limner.config import TrainConfig
from limner.errors import RunError
from limner.progress import progress
from limner.training import auto, checkpoints, optimizers, processes
from limner.training.average import WeightAverage
from limner.training.checkpoints import Facts
from limner.training.journal import Journal
from limner.training.processes import on_main
from limner.training.task import Task, place, step

COOLDOWN = 0.3  # share of the run at whose end the learning rate falls
TIMED_STEPS = 2  # of --dry-run, after one to warm up

C = TypeVar("C", bound=TrainConfig)


def run_training(make: Callable[[C], Task], config: C) -> Path:
    """Train what `make` builds, going on where a run was stopped; a finished run is left as it is. -> the run folder.

    Raises what `make` raises and ConfigError before anything is written, and RunError. All of several processes, as
    `accelerate launch` starts them, call it; only the main one writes and prints.
    """
    started = time.time()
    accelerator = processes.join(config.out)
    build = partial(_build, make)
    config = auto.settled(build, config, accelerator)
    processes.refuse_uneven(config.batch_size, accelerator)
    task = build(config)
    run = on_main(accelerator, Run.open, config.out, config, task.parents)
    said = on_main(accelerator, _nothing_to_do, run, config)
    if said is None:
        facts = _train(task, config, run, accelerator)
        on_main(accelerator, run.finish, started=started, **facts)
        said = str(run.model)
    if accelerator.is_main_process:
        print(said)
    accelerator.end_training()
    return run.folder


def plan_training(make: Callable[[C], Task], config: C) -> dict[str, Any]:
    """What `run_training` would do: sizes, and the time as a few steps on this machine took. Nothing is written."""
    accelerator = processes.join(None)
    build = partial(_build, make)
    config = auto.settled(build, config, accelerator)
    processes.refuse_uneven(config.batch_size, accelerator)
    task = build(config)
    place(task.network, accelerator)
    optimizer = optimizers.new(task.network, config, task.rates)
    batches = task.stream.batches(0, (TIMED_STEPS + 1) * config.batch_size, config.batch_size)
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        if number == 1:
            started = time.perf_counter()
        figures = step(task, task.network, optimizer, batch, rate=0.0, seed=0, config=config, accelerator=accelerator)
        figures["loss"].item()  # waits for the GPU
    rate = TIMED_STEPS * config.batch_size / (time.perf_counter() - started)
    count = sum(p.numel() for p in task.network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in task.network.parameters() if not p.requires_grad)
    return {
        "trains": f"{count / 1e6:.1f} M parameters in {config.precision} on {accelerator.device}",
        "examples": f"{task.stream.length:,}, each seen about {config.images / task.stream.length:.1f} times",
        "steps": f"{math.ceil(config.images / config.batch_size):,} of {config.batch_size} images",
        "memory": f"{(count * 20 + frozen * 4) / 1e6:,.0f} MB for weights, gradients, {config.optimizer} and average, "
        "besides activations",
        "checkpoint": f"{count * 16 / 1e6:,.0f} MB each, {config.keep_checkpoints} and the best are kept",
        "time": f"{config.images / rate / 60:,.0f} minutes at {rate:.1f} images/s, without validation",
        "out": config.out,
    }


def _build(make: Callable[[C], Task], config: C) -> Task:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # the first weights of a new network
    return make(config)


def _nothing_to_do(run: Run, config: TrainConfig) -> str | None:
    """What there is to say of a finished run; None where there is something to train."""
    if not run.finished:
        return None
    images = run.manifest["images"]
    if run.manifest.get("stopped_early"):
        return (
            f"Nothing to do: {run.folder} stopped early after {images} images, {config.patience} validations in a row "
            "without a new best; train with more patience in a new folder to go further."
        )
    return f"Nothing to do: {run.folder} is finished; raise --images to go on." if images >= config.images else None


def _train(task: Task, config: TrainConfig, run: Run, accelerator: Accelerator) -> dict[str, Any]:
    """Train until `config.images` were seen or patience ends, resuming from the newest checkpoint; write `run.model`.

    Returns facts for the manifest. Raises RunError when the loss stops being a number; the last good checkpoint
    is left as it is.
    """
    place(task.network, accelerator)
    optimizer = optimizers.new(task.network, config, task.rates)
    average = WeightAverage(task.network, config.ema_halflife)
    facts = checkpoints.load_newest(run.checkpoints, task.network, average, optimizer)
    network = accelerator.prepare(task.network)  # for which processes meet, so that none still reads what is tidied
    on_main(accelerator, checkpoints.tidy, run.checkpoints, config.keep_checkpoints, facts)
    if config.compile:
        network = torch.compile(network)
    journal = Journal(run.folder, accelerator)
    batches = task.stream.batches(
        facts.images,
        config.images,
        config.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=config.workers,
    )

    with _progress(facts, config, accelerator) as advance, closing(batches):
        while not _over(facts, config):
            seen = facts.images
            rate = learning_rate(seen, config)
            dropout = config.seed + seen + accelerator.process_index
            figures = step(
                task, network, optimizer, next(batches), rate=rate, seed=dropout, config=config, accelerator=accelerator
            )
            figures = accelerator.reduce(figures, "mean")
            for name in ("loss", "gradient"):
                _refuse_nan(name, figures[name].item(), seen, config)
            facts = replace(facts, images=seen + config.batch_size)
            average.update(config.batch_size, facts.images)
            advance(config.batch_size)

            if _due(config.log_every, seen, facts, config):
                journal.write(facts.images, {**figures, "lr": rate})
            if _due(config.validate_every, seen, facts, config):
                validation = on_main(accelerator, _validate, task, average, run.samples / f"{facts.images:09d}")
                journal.write(facts.images, {f"validation/{name}": value for name, value in validation.items()})
                _refuse_nan("validation loss", validation["loss"], facts.images, config)
                facts = facts.judged(validation)
            if facts.is_best or _due(config.checkpoint_every, seen, facts, config):
                kept = run.checkpoints, config.keep_checkpoints
                on_main(accelerator, checkpoints.save, *kept, task.network, average, optimizer, facts)

    judged = on_main(accelerator, _write_result, task, average, facts, config, run)
    early = facts.images < config.images
    return {"images": facts.images, "stopped_early": early, "seed": config.seed, "validation": judged}


def learning_rate(seen: int, config: TrainConfig) -> float:
    """Linear rise over `warmup` images, then constant, then a linear fall to `final_lr` over the last 30 %."""
    rise = min(1.0, (seen + config.batch_size) / max(config.warmup, 1))
    left = (config.images - seen) / (COOLDOWN * config.images)
    return config.lr * rise * (config.final_lr + (1 - config.final_lr) * min(1.0, left))


def _over(facts: Facts, config: TrainConfig) -> bool:
    """Whether a training ends here: all images were seen, or validation after validation brought no new best."""
    return facts.images >= config.images or (config.patience is not None and facts.stale >= config.patience)


def _due(every: int, before: int, facts: Facts, config: TrainConfig) -> bool:
    """Whether what is done every so many images, and at the end, is to be done after this step."""
    return before // every != facts.images // every or _over(facts, config)


def _progress(
    facts: Facts, config: TrainConfig, accelerator: Accelerator
) -> AbstractContextManager[Callable[[int], None]]:
    if accelerator.is_main_process:
        return progress("images", config.images, done=facts.images)
    return nullcontext(lambda images: None)


def _refuse_nan(what: str, value: float, seen: int, config: TrainConfig) -> None:
    if not math.isfinite(value):
        bf16 = ", or train with precision=fp32" if config.precision == "bf16" else ""
        raise RunError(
            f"The {what} became {value} after {seen} images, and what was kept before that is left as it is; "
            f"lower lr ({config.lr:g}) or clip_norm ({config.clip_norm:g}){bf16}, and start in a new folder."
        )


def _validate(task: Task, average: WeightAverage, samples: Path) -> dict[str, float]:
    samples.mkdir(parents=True, exist_ok=True)
    task.network.eval()
    with average.applied(), torch.no_grad():
        figures = task.validate(samples)
    task.network.train()
    return figures


def _write_result(
    task: Task, average: WeightAverage, facts: Facts, config: TrainConfig, run: Run
) -> dict[str, float] | None:
    """Write the weight average, the last or the best, as the result. -> the figures of its validation."""
    if config.result == "best":
        facts = checkpoints.load_best(run.checkpoints, task.network, average)
    task.network.eval()
    with average.applied(), atomic_folder(run.model) as folder:
        task.save(folder)
    return facts.validation
