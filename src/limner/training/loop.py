"""The one training loop. What is trained, on what, and how well it does is a `Task`; the rest is here."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import nn

from limner.artifacts import Run, atomic_folder
from limner.config import TrainConfig
from limner.errors import RunError
from limner.progress import progress
from limner.training import auto, checkpoints, memory, optimizers, processes
from limner.training.average import WeightAverage
from limner.training.checkpoints import Facts
from limner.training.journal import Journal, refuse_unavailable
from limner.training.lanes import Lanes
from limner.training.memory import Need, megabytes
from limner.training.processes import on_main
from limner.training.task import Task, place, recompute, step

log = logging.getLogger(__name__)

COPYING = 0.1  # share of copies that is warned of: of so few pictures one may be near another by chance
COOLDOWN = 0.3  # share of the run at whose end the learning rate falls
TIMED_STEPS = 2  # of --dry-run, after one to warm up

C = TypeVar("C", bound=TrainConfig)


def run_training(make: Callable[[C], Task], config: C) -> Path:
    """Train what `make` builds, going on where a run was stopped; a finished run is left as it is. -> the run folder.

    Raises what `make` raises and ConfigError before the run folder is made, and RunError. All of several processes, as
    `accelerate launch` starts them, call it; only the main one writes and prints.
    """
    started = time.time()
    task, config, accelerator = _begin(make, config)
    run = on_main(accelerator, Run.open, config.out, config, task.parents)
    said = on_main(accelerator, _nothing_to_do, run, config)
    if said is None:
        with ExitStack() as stack:
            on_main(accelerator, stack.enter_context, run.work(config))
            facts = _train(task, config, run, accelerator)
            on_main(accelerator, run.finish, started=started, **facts, **task.facts)
        said = str(run.model)
    if accelerator.is_main_process:
        print(said)
    accelerator.end_training()
    return run.folder


def plan_training(make: Callable[[C], Task], config: C) -> dict[str, Any]:
    """What `run_training` would do: sizes, and the time as a few steps on this machine took. Nothing is written."""
    task, config, accelerator = _begin(make, config)
    with memory.shortage(config, accelerator):
        place(task.network, accelerator)
        need = Need.of(task, config, accelerator)
        need.warn(config, accelerator)
        there = memory.free(accelerator)
        optimizer = optimizers.new(task.network, config, task.rates)
    lanes = Lanes.of(_compiled(task.network, config), config, accelerator)
    batches = task.stream.batches(0, (TIMED_STEPS + 1) * config.batch_size, config.batch_size)
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        if number == 1:
            started = time.perf_counter()
        with memory.shortage(config, accelerator):
            figures = step(task, lanes, optimizer, batch, rate=0.0, seed=0, config=config, accelerator=accelerator)
        figures["loss"].item()  # waits for the GPU
    rate = TIMED_STEPS * config.batch_size / (time.perf_counter() - started)
    return {
        "trains": f"{need.trained / 4e6:.1f} M parameters in {config.precision} on {accelerator.device}",
        "examples": f"{task.stream.length:,}, each seen about {config.images / task.stream.length:.1f} times",
        "steps": f"{math.ceil(config.images / config.batch_size):,} of {config.batch_size} images",
        "memory": f"{megabytes(need.lasting)} for weights, gradients, {config.optimizer} and average, "
        f"about {megabytes(need.activations)} for activations of {memory.held(config, accelerator)} images"
        f"; {megabytes(there)} are free",
        "checkpoint": f"{megabytes(need.checkpoint)} each, {config.keep_checkpoints} and the best are kept",
        "time": f"{config.images / rate / 60:,.0f} minutes at {rate:.1f} images/s, without validation",
        "out": config.out,
    }


def _begin(make: Callable[[C], Task], config: C) -> tuple[Task, C, Accelerator]:
    """The task, the configuration with numbers in place of `auto`, and the processes; nothing is written."""
    refuse_unavailable(config.trackers)
    memory.keep_freed()
    torch.backends.cudnn.benchmark = True  # of shapes that stay, the quickest kernels are worth looking for
    accelerator = processes.join(config.out)
    optimizers.refuse_missing(config.optimizer, accelerator.device)
    build = partial(_build, make)
    config = auto.settled(build, config, accelerator)
    processes.refuse_uneven(config.batch_size, accelerator)
    with memory.shortage(config, accelerator):
        return build(config), config, accelerator


def _build(make: Callable[[C], Task], config: C) -> Task:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # the first weights of a new network
    task = make(config)
    if config.checkpointing:
        recompute(task.network)
    return task


def _compiled(network: nn.Module, config: TrainConfig) -> nn.Module:
    return cast(nn.Module, torch.compile(network)) if config.compile else network


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
    with memory.shortage(config, accelerator):
        place(task.network, accelerator)
        Need.of(task, config, accelerator).warn(config, accelerator)
        optimizer = optimizers.new(task.network, config, task.rates)
        average = WeightAverage(task.network, config.ema_halflife)
        facts = checkpoints.load_newest(run.checkpoints, task.network, average, optimizer)
    network = accelerator.prepare(task.network)  # for which processes meet, so that none still reads what is tidied
    on_main(accelerator, checkpoints.tidy, run.checkpoints, config.keep_checkpoints, facts)
    lanes = Lanes.of(_compiled(network, config), config, accelerator)
    journal = Journal(run.folder, config, accelerator, facts.images)
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
            given = {"rate": rate, "seed": dropout, "config": config, "accelerator": accelerator}
            with memory.shortage(config, accelerator):
                figures = step(task, lanes, optimizer, next(batches), **given)
            figures = accelerator.reduce(figures, "mean")
            for name in ("loss", "gradient"):
                _refuse_nan(name, figures[name].item(), seen, config)
            facts = facts.trained_on(config.batch_size, figures.get("error", figures["loss"]).item())
            average.update(config.batch_size, facts.images, optimizers.reached(optimizer, average.parameters))
            advance(config.batch_size)

            if _due(config.log_every, seen, facts, config):
                journal.write(facts.images, {**figures, "lr": rate})
            if _due(config.validate_every, seen, facts, config):
                samples = run.samples / f"{facts.images:09d}"
                validation = on_main(accelerator, _validate, task, average, samples, config, accelerator)
                _refuse_nan("validation loss", validation["loss"], facts.images, config)
                before, facts = facts, facts.judged(validation, config.counted)
                judged = {f"validation/{name}": value for name, value in validation.items()}
                journal.write(facts.images, judged if facts.gap is None else {**judged, "gap": facts.gap})
                if accelerator.is_main_process:
                    _warn_of_overfitting(before, facts, config)
            if facts.is_best or _due(config.checkpoint_every, seen, facts, config):
                kept = run.checkpoints, config.keep_checkpoints
                on_main(accelerator, checkpoints.save, *kept, task.network, average, optimizer, facts)

    validated = on_main(accelerator, _write_result, task, average, facts, config, run)
    early = facts.images < config.images
    return {"images": facts.images, "stopped_early": early, "seed": config.seed, "validation": validated}


def learning_rate(seen: int, config: TrainConfig) -> float:
    """Linear rise over `warmup` images, and the shape that `schedule` sets.

    That is constant with a linear fall to `final_lr` over the last 30 % of the images, half a cosine from the end of
    the rise to `final_lr` (Loshchilov and Hutter 1608.03983, equation 5), or constant.
    """
    rise = min(1.0, (seen + config.batch_size) / max(config.warmup, 1))
    left = 1.0  # of the way from `final_lr` up to `lr`
    if config.schedule == "cooldown":
        left = min(1.0, (config.images - seen) / (COOLDOWN * config.images))
    elif config.schedule == "cosine":
        done = max(0, seen - config.warmup) / max(1, config.images - config.warmup)
        left = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return config.lr * rise * (config.final_lr + (1 - config.final_lr) * left)


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


def _warn_of_overfitting(before: Facts, facts: Facts, config: TrainConfig) -> None:
    best = "is what becomes the result" if config.result == "best" else "is what result=best would take"
    if facts.begins_to_overfit:
        log.warning(
            "At %s validations in a row the validation loss had risen and the training loss fallen: the network begins "
            "to learn its pictures by heart; checkpoints/best, after %s images, %s.",
            *(checkpoints.OVERFIT, facts.best_at, best),
        )
    if facts.copies > COPYING >= before.copies:
        log.warning(
            "After %s images %.0f %% of what is drawn for train captions is nearer to a train picture than val "
            "pictures are: the network begins to draw copies, which more pictures or fewer images prevent; "
            "checkpoints/best, after %s images, %s.",
            *(facts.images, 100 * facts.copies, facts.best_at, best),
        )


def _validate(
    task: Task, average: WeightAverage, samples: Path, config: TrainConfig, accelerator: Accelerator
) -> dict[str, float]:
    samples.mkdir(parents=True, exist_ok=True)
    task.network.eval()
    with average.applied(), torch.no_grad(), memory.shortage(config, accelerator):
        figures = task.validate(samples)
    task.network.train()
    return figures


def _write_result(
    task: Task, average: WeightAverage, facts: Facts, config: TrainConfig, run: Run
) -> dict[str, float] | None:
    """Write the weight average, the last or the best, as the result. -> the figures of its validation."""
    if config.result == "best" and facts.best_at is not None:  # none yet where `images` was lowered
        facts = checkpoints.load_best(run.checkpoints, task.network, average)
    task.network.eval()
    with average.applied(), atomic_folder(run.model) as folder:
        task.save(folder)
    return facts.validation
