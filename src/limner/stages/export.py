"""limner models export: a model's networks in another program's format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from limner import artifacts
from limner.config import ExportConfig
from limner.errors import ConfigError, ModelError
from limner.generation.jobs import Spec, make_jobs, read_spec
from limner.models import loading

FILE = "export.json"


def run(config: ExportConfig) -> Path:
    """Write the networks, the tokenizer, the scheduler and `export.json` into `config.out`, all or nothing.

    Raises ConfigError and ModelError.
    """
    spec, (width, height) = _read(config, None)
    from limner.models import export

    export.require(config.to)
    ref, files = str(spec.folder), {}
    with artifacts.atomic_folder(config.out) as folder:
        for network in export.networks(ref, (width, height), guided=config.guided):
            file = export.write(network, config.to, folder)
            shapes = {name: list(example.shape) for name, example in network.inputs.items()}
            files[network.name] = {"file": file.name, "inputs": shapes, "output": network.output}
            print(config.out / file.name, flush=True)
        for part in ("tokenizer", "scheduler"):
            shutil.copytree(loading.component(ref, part), folder / part)
        about = {
            "model": spec.ref,
            "format": config.to,
            "size": f"{width}x{height}",
            "weights": {part: loading.identity(ref, part) for part in spec.parts},
            "networks": files,
        }
        artifacts.write_json(folder / FILE, about)
    return config.out


def plan(config: ExportConfig) -> dict[str, Any]:
    """What `run` would write; nothing is fetched."""
    there = loading.resolve_here(config.model)
    if there is None:
        return {"model": f"{config.model}, to be fetched", "format": config.to, "out": config.out}
    spec, (width, height) = _read(config, there)
    return {
        "model": f"{spec.ref} ({spec.pipeline})",
        "format": config.to,
        "size": f"{width}x{height} pixels, fixed",
        "U-Net takes": "two pictures at once, for guidance" if config.guided else "one picture",
        "out": config.out,
    }


def _read(config: ExportConfig, folder: Path | None) -> tuple[Spec, tuple[int, int]]:
    """The model, read from `folder` where that is known already, and width and height in pixels."""
    spec = read_spec(config.model, folder)
    if not spec.own_loop:
        raise ModelError(f"{spec.ref} is a {spec.pipeline}; only Stable Diffusion 1 and 2 can be exported.")
    out = config.out
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / FILE).is_file()):
        raise ConfigError(f"{out} exists and is no export; choose another --out.")
    job = make_jobs(spec, ["size"], size=config.size)[0]
    assert job.width is not None
    assert job.height is not None
    return spec, (job.width, job.height)
