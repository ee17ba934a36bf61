"""limner generate: prompts to pictures."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner import artifacts
from limner.config import GenerateConfig
from limner.diffusion import samplers
from limner.errors import ConfigError
from limner.generation import catalogue, grids, provenance, ranking, setup, sheets, sources, terminal
from limner.generation import prompts as texts
from limner.generation.jobs import (
    Job,
    Spec,
    check_count,
    make_jobs,
    read_embeddings,
    read_loras,
    read_spec,
    warn_of_sizes,
)
from limner.models import loading
from limner.models.inversion import Inversion
from limner.models.lora import Lora

if TYPE_CHECKING:
    from PIL.Image import Image

    from limner.generation.model import Picture
    from limner.generation.painters import OnPreview

OWN = "the pipeline's own"
PREVIEW_EVERY = 0.2  # seconds


def run(config: GenerateConfig) -> None:
    """Draw the pictures into the folder `config.out` and print the path of each as soon as it is there.

    Raises ConfigError, DataError and ModelError before anything is loaded where the settings can tell.
    """
    spec, loras, embeddings, cells = _read(config, None)
    from limner.generation.model import Model
    from limner.progress import progress

    model = Model(spec, config.device, loras, embeddings, config.precision, config.low_memory, config.engine)
    jobs = model.settle([job for cell in cells for job in cell])
    if config.format == "jpeg":  # which has little room
        for job in jobs:
            provenance.check_fits(model.record(job), config.format)
    on_preview = None if config.preview is None else _previewer(config.preview)
    drawn = []
    with progress("Drawing", sum(job.steps_taken for job in jobs)) as advance:
        pictures = model.draw(jobs, batch_size=config.batch_size, on_step=advance, on_preview=on_preview)
        if config.best_of is not None:
            pictures = model.best(pictures, config.n, config.best_of)
        for picture in pictures:
            path = picture.save(config.out, config.format, config.quality)
            print(path, flush=True)
            if config.grid or config.sheet or config.show:
                drawn.append(picture)
    for kind, sheet in _sheets(config, drawn, cells):
        names = provenance.free_names(config.out / f"{kind}.png")
        print(artifacts.write_new(names, partial(sheet.save, format="PNG")), flush=True)
    if config.show:
        for picture in drawn:
            terminal.show(picture.image)


def _sheets(
    config: GenerateConfig, drawn: Sequence[Picture], cells: Sequence[Sequence[Job]]
) -> Iterator[tuple[str, Image]]:
    """The grids and the contact sheet that were asked for, by what they are."""
    if config.grid is not None:
        images = iter([picture.image for picture in drawn])
        by_cell = [list(islice(images, len(cell))) for cell in cells]
        for grid in grids.grids(grids.axes(config.grid), by_cell, cells[0]):
            yield "grid", grid
    if config.sheet:
        labels = [f"{picture.record['prompt']} (seed\u00a0{picture.record['seed']})" for picture in drawn]
        yield "sheet", sheets.contact([picture.image for picture in drawn], labels)


def _previewer(file: Path) -> OnPreview:
    """Writes previews into a file, each over the last, but not more often than eyes and disks can follow."""
    last = 0.0

    def write(_: Job, image: Callable[[], Image]) -> None:
        nonlocal last
        if time.monotonic() - last >= PREVIEW_EVERY:
            with artifacts.atomic_file(file) as hidden:
                image().save(hidden, "PNG")
            last = time.monotonic()

    return write


def plan(config: GenerateConfig) -> dict[str, Any]:
    """What `run` would draw, with what, and what is known of its cost; nothing is fetched or written."""
    there = loading.resolve_here(config.model)
    if there is None:
        pictures = _count(config, _prompts(config))
        return {"model": f"{config.model}, to be fetched; its size is not known yet", "pictures": pictures}
    spec, loras, embeddings, cells = _read(config, there)
    jobs = [job for cell in cells for job in cell]
    first, found = jobs[0], catalogue.look_into(config.model, there)
    how = setup.choose(setup.choose_device(config.device), config.precision, config.low_memory, config.engine)
    needed = found.memory(how.precision, low_memory=config.low_memory)
    seeds = sorted({job.seed for job in jobs})
    return {
        "model": f"{spec.ref} ({spec.pipeline})",
        **({"LoRAs": ", ".join(f"{lora.ref} at {lora.weight:g}" for lora in loras)} if loras else {}),
        **({"embeddings": ", ".join(f"{added.ref} as {added.token}" for added in embeddings)} if embeddings else {}),
        "parameters": ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in found.parameters.items()),
        "memory": f"about {needed / 2**20:,.0f} MiB in {how.precision}, estimated",
        "pictures": f"{len(jobs)} ({len(cells) * _drawn(config)} a prompt), {_shown_size(first)}",
        "seeds": seeds[0] if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}",
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
) -> tuple[Spec, tuple[Lora, ...], tuple[Inversion, ...], list[list[Job]]]:
    """The model's own settings, read from `folder` where that is known already, what is added to it, and the jobs, by
    the cells of the grid; without one all are in one."""
    prompts = _prompts(config)
    artifacts.check_writable(config.out, "--out")
    if config.preview is not None:
        if config.preview.is_dir():
            raise ConfigError(f"{config.preview} is a folder; name a file with --preview.")
        artifacts.check_writable(config.preview.parent, "--preview")
    _count(config, prompts)  # which refuses what is too many
    cells = grids.cells(config, _axes(config))
    image = None if config.image is None else sources.read_picture(config.image)
    mask = None if config.mask is None else sources.read_mask(config.mask)
    if config.show:
        terminal.check()
    spec = read_spec(config.model, folder)
    loras, embeddings = read_loras(spec, config.loras), read_embeddings(spec, config.embeddings)
    if config.best_of is not None:
        ranking.check(spec, config.n, config.best_of)
    if config.preview is not None and not spec.own_loop:
        raise ConfigError(f"{spec.ref} is a {spec.pipeline}, of which there are no previews; leave out --preview.")
    jobs = [
        make_jobs(
            spec,
            prompts,
            n=_drawn(config),
            seed=cell.seed,
            steps=cell.steps,
            guidance=cell.guidance,
            negative=cell.negative,
            size=cell.size,
            scheduler=cell.scheduler,
            guidance_rescale=cell.guidance_rescale,
            reuse=cell.reuse,
            variation=cell.variation,
            image=image,
            mask=mask,
            strength=cell.strength,
        )
        for cell in cells
    ]
    warn_of_sizes(spec, [job for cell in jobs for job in cell])
    return spec, loras, embeddings, jobs


def _axes(config: GenerateConfig) -> Sequence[grids.Axis]:
    """Those of the grid. Raises ConfigError."""
    return () if config.grid is None else grids.axes(config.grid)


def _drawn(config: GenerateConfig) -> int:
    """How many pictures a prompt are drawn, in each cell of the grid."""
    return config.n if config.best_of is None else config.best_of


def _count(config: GenerateConfig, prompts: Sequence[str]) -> int:
    """How many pictures are drawn in all. Raises ConfigError where those are too many."""
    pictures = math.prod(len(axis.values) for axis in _axes(config)) * _drawn(config) * len(prompts)
    check_count(pictures)
    return pictures


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
