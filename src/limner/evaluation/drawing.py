"""Pictures for many captions, drawn once: what lies there already is kept where it would be drawn the same."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from limner.artifacts import read_json, write_json
from limner.errors import DataError
from limner.generation import provenance
from limner.generation.jobs import Job
from limner.generation.model import Model
from limner.progress import progress
from limner.training.memory import proc

COST = "cost.json"


def draw(model: Model, jobs: Mapping[Path, Job], folder: Path, *, batch_size: int) -> None:
    """Draw each job into its file, a PNG below `folder`, unless that very picture is there.

    `folder`/cost.json tells the seconds a picture of each batch, but for the first of a call, which warms up, and the
    most memory that drawing took, over all calls that drew for it. Raises ConfigError and ModelError as `Model.draw`
    does, OSError as the writing does.
    """
    settled = dict(zip(jobs, model.settle(list(jobs.values()))))
    missing = {file: job for file, job in settled.items() if not _is_there(file, job, model)}
    if not missing:
        return
    files = list(missing)
    at_once = model.at_once(missing[files[0]], batch_size)
    _forget_peak(model.device)
    with progress("Drawing", len(settled), done=len(settled) - len(missing)) as advance:
        for start in range(0, len(files), at_once):
            batch, begun = files[start : start + at_once], time.perf_counter()
            pictures = list(model.draw([missing[file] for file in batch], batch_size=batch_size))
            seconds = (time.perf_counter() - begun) / len(batch)
            for file, picture in zip(batch, pictures, strict=True):
                provenance.write(picture.image, picture.record, file)
                advance(1)
            _add_cost(folder / COST, model, missing[batch[0]], [seconds] if start else [])


def _is_there(file: Path, job: Job, model: Model) -> bool:
    """Whether the file holds what the model would draw for the job."""
    if not file.exists():
        return False
    try:
        record = provenance.read(file)
    except DataError:  # of another origin, or cut off
        return False
    wanted = {name: value for name, value in vars(job).items() if value is not None}  # None is the pipeline's own
    facts, arithmetic = ("weights", "scheduler", "loras"), ("type", "engine", "precision")
    return (
        wanted.items() <= record.items()
        and all(record["model"][name] == model.facts[name] for name in facts)
        and all(record["device"].get(name) == model.device_facts[name] for name in arithmetic)
    )


def _add_cost(file: Path, model: Model, job: Job, seconds: Sequence[float]) -> None:
    """Add what drawing took to what it took before, where that was on the same device with the same settings."""
    where = {"model": model.facts["sha256"], "steps": job.steps, "guidance": job.guidance, **model.device_facts}
    before = read_json(file) if file.is_file() else {}
    if before.get("where") != where:
        before = {"seconds": [], "memory": None}
    peaks = [value for value in (before["memory"], _peak(model.device)) if value is not None]
    times = [*before["seconds"], *(round(value, 4) for value in seconds)]
    write_json(file, {"where": where, "seconds": times, "memory": max(peaks, default=None)})


def _forget_peak(device: torch.device) -> None:
    """Let `_peak` tell of what comes, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def _peak(device: torch.device) -> int | None:
    """Bytes held at most, of the GPU's memory or by the process; None where the system doesn't tell, as Linux does."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else proc("/proc/self/status", "VmHWM")


def cost(folder: Path) -> dict[str, Any] | None:
    """What drawing the pictures of a folder took; None where nothing was drawn there."""
    file = folder / COST
    return read_json(file) if file.is_file() else None
