"""limner generate: prompts to pictures."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limner.config import GenerateConfig
from limner.diffusion import samplers
from limner.errors import ConfigError
from limner.generation import prompts as texts
from limner.generation.jobs import Job, Spec, count_parameters, make_jobs, read_embeddings, read_loras, read_spec
from limner.models import hub, loading
from limner.models.inversion import Inversion
from limner.models.lora import Lora

OWN = "the pipeline's own"


def run(config: GenerateConfig) -> None:
    """Draw the pictures into the folder `config.out` and print the path of each as soon as it is there.

    Raises ConfigError and ModelError before anything is loaded where the settings can tell.
    """
    spec, loras, embeddings, jobs = _read(config, None)
    from limner.generation.model import Model
    from limner.progress import progress

    model = Model(spec, config.device, loras, embeddings)
    jobs = model.settle(jobs)
    with progress("Drawing", sum(job.steps or 0 for job in jobs)) as advance:
        for picture in model.draw(jobs, batch_size=config.batch_size, on_step=advance):
            path = picture.save(config.out)
            print(path, flush=True)


def plan(config: GenerateConfig) -> dict[str, Any]:
    """What `run` would draw, with what, and what is known of its cost; nothing is fetched or written."""
    cached = hub.cached(config.model) if loading.is_hub_id(config.model) else None
    if loading.is_hub_id(config.model) and cached is None:
        pictures = len(_prompts(config)) * config.n
        return {"model": f"{config.model}, to be fetched; its size is not known yet", "pictures": pictures}
    spec, loras, embeddings, jobs = _read(config, cached)
    first, counts = jobs[0], count_parameters(spec)
    last_seed = config.seed + config.n - 1
    return {
        "model": f"{spec.ref} ({spec.pipeline})",
        **({"LoRAs": ", ".join(f"{lora.ref} at {lora.weight:g}" for lora in loras)} if loras else {}),
        **({"embeddings": ", ".join(f"{added.ref} as {added.token}" for added in embeddings)} if embeddings else {}),
        "parameters": ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in counts.items()),
        "memory": f"{sum(counts.values()) * 4 / 2**20:,.0f} MiB for the weights, more while drawing",
        "pictures": f"{len(jobs)} ({config.n} a prompt), {_shown_size(first)}",
        "seeds": config.seed if config.n == 1 else f"{config.seed} to {last_seed}",
        "steps": first.steps or OWN,
        "guidance": first.guidance or OWN,
        "scheduler": samplers.label(first.scheduler, spec.scheduler) if spec.scheduler else first.scheduler or OWN,
        "time": "not known before the first step; then the progress bar tells",
        "out": config.out,
    }


def _shown_size(job: Job) -> str:
    return f"{job.width}x{job.height} pixels" if job.width else f"size: {OWN}"


def _read(
    config: GenerateConfig, folder: Path | None
) -> tuple[Spec, tuple[Lora, ...], tuple[Inversion, ...], list[Job]]:
    """The model's own settings, read from `folder` where that is known already, what is added to it, and the jobs."""
    prompts = _prompts(config)
    _check_out(config.out)
    spec = read_spec(config.model, folder)
    loras, embeddings = read_loras(spec, config.loras), read_embeddings(spec, config.embeddings)
    jobs = make_jobs(
        spec,
        prompts,
        n=config.n,
        seed=config.seed,
        steps=config.steps,
        guidance=config.guidance,
        negative=config.negative,
        size=config.size,
        scheduler=config.scheduler,
        guidance_rescale=config.guidance_rescale,
    )
    return spec, loras, embeddings, jobs


def _prompts(config: GenerateConfig) -> Sequence[str]:
    """The prompts of the command, then those of the file; without either, those piped in. Raises ConfigError."""
    prompts = [texts.checked(prompt) for prompt in config.prompts]
    if config.prompts_file is not None:
        prompts += texts.from_file(config.prompts_file)
    elif not prompts and sys.stdin is not None and not sys.stdin.isatty():
        prompts = texts.from_stdin()
    if not prompts:
        raise ConfigError(
            "There is no prompt; write one behind limner generate, name a --prompts file or pipe some in."
        )
    return prompts


def _check_out(out: Path) -> None:
    """Raise ConfigError where pictures can't be written, before time is spent on drawing them."""
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ConfigError(f"{there} is a file; choose another --out.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"There is no right to write in {there}; choose another --out.")
