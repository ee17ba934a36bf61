"""`--auto`: the batch size and the learning rate that suit a network and this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator

from limner.artifacts import read_json
from limner.config import TrainConfig
from limner.errors import ConfigError
from limner.settings import resolve
from limner.training import memory, optimizers
from limner.training.average import WeightAverage
from limner.training.lanes import Lanes
from limner.training.task import Task, loss, place, step

SMALLEST = 8  # images a step that the search begins with
GAIN = 1.05  # by which images/s must rise for twice as many images a step
TIMED = 3  # steps of each size, after one to warm up; the fastest counts, as other programs only ever slow one down
ROOM = 0.5  # share of the free memory that a training on CPU may take

LOWEST, HIGHEST, STEPS = 1e-6, 1e-1, 60  # of the range test
DIVERGED = 4.0  # times the least loss so far, at which it ends
WINDOW = 9  # losses to a straight line, about three quarters of a decade of learning rates
SHARE = 1 / 3  # of the rate at which the loss falls fastest

C = TypeVar("C", bound=TrainConfig)


def settled(build: Callable[[C], Task], config: C, accelerator: Accelerator) -> C:
    """`config` with numbers in place of `auto`: those of the run folder if it has been begun, or else found here.

    What was set by name stays. The search trains networks of its own, so that a run is the same, bit for bit, as one
    that was given these numbers. Raises ConfigError, RunError where memory does not suffice, and what `build` raises.
    """
    if not config.auto:
        return config
    wanted = [name for name in ("batch_size", "lr") if name not in config.model_fields_set]
    if not wanted:
        raise ConfigError(
            "auto has nothing to find where batch_size and lr are both given; leave out one of the three."
        )
    begun = config.out / "config.json"
    if begun.exists():
        known = read_json(begun)
        return _with(config, {name: known[name] for name in wanted if name in known})
    if accelerator.num_processes > 1:
        raise ConfigError("auto searches with one process; give batch_size and lr to several.")
    found: dict[str, float] = {}
    if "batch_size" in wanted:
        smallest = _with(config, {"batch_size": SMALLEST})
        with memory.shortage(smallest, accelerator):
            found["batch_size"] = find_batch_size(build(smallest), smallest, accelerator)
    if "lr" in wanted:
        fitting = _with(config, found)
        with memory.shortage(fitting, accelerator):
            found["lr"] = find_rate(build(fitting), fitting, accelerator)
    print("auto found " + " and ".join(f"{name} {value:g}" for name, value in found.items()))
    return _with(config, found)


def find_batch_size(task: Task, config: TrainConfig, accelerator: Accelerator) -> int:
    """The batch size beyond which steps bring no more images a second, or have no room in memory; no weight moves.

    Raises ConfigError where not even the smallest size has room.
    """
    on_cpu = accelerator.device.type == "cpu"  # a GPU says itself when it is full
    pace = timed(task, config, accelerator, room=int(ROOM * memory.free(accelerator)) if on_cpu else None)
    return doubled(pace, most=min(task.stream.largest, config.images))


def timed(task: Task, config: TrainConfig, accelerator: Accelerator, *, room: int | None) -> Callable[[int], float]:
    """A function that measures images a second by batch size; no weight moves.

    `room`: bytes that steps may take of this process's memory, if there is a bound. A size that would take more, by
    what the size before it took, raises torch.OutOfMemoryError, as a GPU does.
    """
    place(task.network, accelerator)
    optimizer = optimizers.new(task.network, config, task.rates)
    average = WeightAverage(task.network, config.ema_halflife)
    lanes = Lanes.of(task.network, config, accelerator)
    before = memory.proc("/proc/self/status", "VmRSS")
    taken = 0.0  # bytes an image

    def pace(size: int) -> float:
        nonlocal taken
        if room is not None and taken * size > room:
            raise torch.OutOfMemoryError
        batch = next(task.stream.of(size).batches(0, size, size))
        seconds = []
        for _ in range(TIMED + 1):
            started = time.perf_counter()
            figures = step(task, lanes, optimizer, batch, rate=0.0, seed=0, config=config, accelerator=accelerator)
            average.update(size, size)
            figures["loss"].item()  # waits for the GPU
            seconds.append(time.perf_counter() - started)
        most = memory.peak(accelerator)
        if before is not None and most is not None:
            taken = (most - before) / size
        return size / min(seconds[1:])

    return pace


def doubled(pace: Callable[[int], float], most: int) -> int:
    """Double a batch size while `pace`, images a second by batch size, rises by more than 5 %, and up to `most`.

    `pace` raises what `memory.is_short` knows where memory does not suffice. Raises ConfigError where that is so from
    the first.
    """
    size = min(SMALLEST, most)
    if (best := _fitting(pace, size)) is None:
        raise ConfigError(f"Memory does not suffice for {size} images a step; give a smaller batch_size.")
    while 2 * size <= most:
        now = _fitting(pace, 2 * size)
        if now is None or now <= GAIN * best:
            break
        size, best = 2 * size, now
    return size


def _fitting(pace: Callable[[int], float], size: int) -> float | None:
    """What `pace` says of a size; None where memory does not suffice for it."""
    try:
        return pace(size)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_short(error):
            raise
        return None


def find_rate(task: Task, config: TrainConfig, accelerator: Accelerator) -> float:
    """The learning rate that `chosen_rate` takes from a range test on the run's first batches; trains the network.

    Raises ConfigError where the loss falls at none.
    """
    place(task.network, accelerator)
    optimizer, lanes = optimizers.new(task.network, config, task.rates), Lanes.of(task.network, config, accelerator)
    batches = task.stream.batches(0, (STEPS + 1) * config.batch_size, config.batch_size, workers=config.workers)
    held_back = next(batches)  # judged by one batch, the loss is free of the noise between batches
    settings = {"config": config, "accelerator": accelerator}

    def loss_after(rate: float) -> float:
        step(task, lanes, optimizer, next(batches), rate=rate, seed=config.seed, **settings)
        torch.manual_seed(config.seed)
        with torch.no_grad():
            return loss(task, task.network, held_back, **settings)[0].item()

    with closing(batches):
        return chosen_rate(*range_test(loss_after))


def range_test(loss_after: Callable[[float], float]) -> tuple[list[float], list[float]]:
    """Steps whose learning rate rises exponentially, until the loss diverges (Smith 1506.01186, section 3.3).

    `loss_after` takes a step at a learning rate and returns the loss after it. -> the rates, and the losses after them.
    """
    rates: list[float] = []
    losses: list[float] = []
    for rate in np.geomspace(LOWEST, HIGHEST, STEPS).tolist():
        value = loss_after(rate)
        if not math.isfinite(value) or value > DIVERGED * min(losses, default=math.inf):
            break
        rates.append(rate)
        losses.append(value)
    return rates, losses


def chosen_rate(rates: list[float], losses: list[float]) -> float:
    """A third of the rate at which the loss of a range test falls fastest, to two digits.

    Fastest in proportion: a straight line is laid through the logarithms of each nine losses in a row, and the steepest
    counts, at the middle of the rates that led from the first of them to the last. Raises ConfigError where none falls.
    """
    offsets = np.arange(WINDOW) - WINDOW // 2
    if len(losses) >= WINDOW:
        logs = np.log(np.maximum(losses, np.finfo(float).tiny))
        slopes = np.lib.stride_tricks.sliding_window_view(logs, WINDOW) @ offsets / (offsets @ offsets)
        first = int(slopes.argmin())
        if slopes[first] < 0:
            return float(f"{SHARE * np.exp(np.log(rates[first + 1 : first + WINDOW]).mean()):.1e}")
    raise ConfigError("auto found no learning rate at which the loss falls; give lr.")


def _with(config: C, found: Mapping[str, object]) -> C:
    return resolve(type(config), {**config.model_dump(), "auto": False, **found})
