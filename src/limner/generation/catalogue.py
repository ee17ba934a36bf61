"""The models that are here: what they are made of, whose licence they have, and what they need of the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from limner import artifacts, system
from limner.errors import ModelError
from limner.generation.jobs import Spec, count_parameters, read_spec
from limner.models import hub, loading

DEPTH = 3  # levels of folders that are looked through
LIBRARIES = 500_000_000  # bytes that torch, Diffusers and Transformers take themselves
CARDS = ("MODEL_CARD.md", "README.md")
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Found:
    """A model folder on this machine."""

    spec: Spec
    parameters: dict[str, int]
    """Weights by part."""
    bytes: int
    """Of the files of those weights."""
    licence: str
    """As the model's card has it, or "unknown"."""

    def memory(self, precision: Literal["fp32", "bf16"], *, low_memory: bool = False) -> int:
        """Bytes that drawing one picture of the model's own size takes, estimated.

        Weights, the libraries, and four of the largest tensors in the VAE's decoder (as measured on Stable Diffusion
        1.5), which with little memory is not there at the same time as the other networks.
        """
        size, weights = BYTES[precision], self.parameters.values()
        decoding = 4 * self._largest_tensor * size
        if not low_memory or not self.spec.own_loop:
            return LIBRARIES + sum(weights) * size + decoding
        biggest = max(self.parameters.get(part, 0) for part in ("unet", "text_encoder")) * size
        return LIBRARIES + max(biggest + decoding // 4, self.parameters.get("vae", 0) * size + decoding)

    @property
    def _largest_tensor(self) -> int:
        """Numbers in it; 0 where only the pipeline knows the size of a picture."""
        if self.spec.size is None:
            return 0
        config = loading.read_config(self.spec.folder / "vae" / "config.json")
        channels = config.get("block_out_channels") or config["decoder_block_out_channels"]
        return int(self.spec.size[0] * self.spec.size[1] * max(channels[:2]))

    def fitting(self, there: int) -> str:
        """Whether it draws in so many bytes: yes, with a setting, or no."""
        for named, precision, low_memory in (
            ("yes", "fp32", False),
            ("with --precision bf16", "bf16", False),
            ("with --low-memory", "bf16", True),
        ):
            if self.memory(precision, low_memory=low_memory) <= there:  # type: ignore[arg-type]
                return named
        return "no"


def look_into(ref: str, folder: Path) -> Found:
    """The model in a folder, which the user calls `ref`. Raises ModelError."""
    spec = read_spec(ref, folder)
    files = [file for part in spec.parts for file in hub.weight_files(folder / part)]
    return Found(spec, count_parameters(spec), sum(file.stat().st_size for file in files), licence(folder))


def look_around(folder: Path) -> Iterator[tuple[str, Found | ModelError]]:
    """The built-in model, those below a folder, and those of the hub's cache, with why one can't be read."""
    places = {"builtin": loading.BUILTIN}
    places |= {str(place): place for place in _below(folder, DEPTH)}
    places |= {ref: place for ref in hub.cached_models() if (place := hub.cached(ref)) and _is_whole(place)}
    for ref, place in places.items():
        if _is_whole(place):
            try:
                yield ref, look_into(ref, place)
            except ModelError as error:
                yield ref, error


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Model folders in a folder, or itself."""
    if _is_whole(folder):
        yield folder
        return
    try:
        inside = sorted(entry.path for entry in os.scandir(folder) if depth and entry.is_dir(follow_symlinks=False))
    except OSError:  # nobody may look into it
        return
    for place in inside:
        if not Path(place).name.startswith("."):
            yield from _below(Path(place), depth - 1)


def _is_whole(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def licence(folder: Path) -> str:
    """What the head of a model's card says, or where its text speaks of it."""
    for name in CARDS:
        file = folder / name
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        if head := re.match(r"---\n(.*?)\n---", text, re.DOTALL):
            for key in ("license_name", "license"):  # the name of one that the hub does not list comes first
                if found := re.search(rf"^{key}:\s*['\"]?([^'\"\n]+?)['\"]?\s*$", head[1], re.MULTILINE):
                    return found[1]
        if re.search(r"^#+ .*licen[cs]e", text, re.MULTILINE | re.IGNORECASE):
            return f"see {name}"
    return "unknown"


def free_memory() -> tuple[int, str]:
    """Bytes that a model may take here, and of what."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    return system.memory().free, "memory"


def facts(found: Found) -> dict[str, Any]:
    """All about a model, for JSON and people."""
    spec, parts = found.spec, {}
    for part in (*spec.parts, *(["clip"] if (spec.folder / "clip").is_dir() else [])):
        folder = spec.folder / part
        hashes = {file.name: artifacts.sha256(file) for file in hub.weight_files(folder)}
        if hashes:
            parts[part] = {
                "class": loading.class_of(folder),
                "parameters": count_parameters(spec, [part])[part],
                "sha256": hashes,
            }
    there, where = free_memory()
    low = {"low_memory": found.memory("bf16", low_memory=True)} if spec.own_loop else {}
    return {
        "model": spec.ref,
        "folder": str(spec.folder),
        "class": spec.pipeline,
        "draws with": "Limner's own loop" if spec.own_loop else "Diffusers' pipeline",
        "licence": found.licence,
        "size": spec.size and f"{spec.size[0]}x{spec.size[1]}",
        "steps": spec.steps,
        "guidance": spec.guidance,
        "bytes": found.bytes,
        "parts": parts,
        "needs": {"fp32": found.memory("fp32"), "bf16": found.memory("bf16"), **low},
        "free": {where: there},
        "fits": found.fitting(there),
    }
