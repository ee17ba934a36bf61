"""Checkpoints: one safetensors file for weights, average and optimiser, one JSON file for the rest; no pickles.

No random state is stored, since all randomness is a function of (seed, images seen): see `stream.py`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limner.artifacts import atomic_folder
from limner.errors import RunError
from limner.training.average import WeightAverage

log = logging.getLogger(__name__)

TENSORS, FACTS = "state.safetensors", "state.json"
BEST = "best"


def save(
    folder: Path, network: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Write the checkpoint `folder` atomically. `facts` is JSON and holds at least `images`, those seen so far."""
    tensors = _prefixed("network", network.state_dict())
    tensors |= _prefixed("average", average.state())
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= _prefixed(f"optimizer.{number}", state)
    with atomic_folder(folder) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
        (partial / FACTS).write_text(json.dumps(facts))


def load_newest(
    checkpoints: Path, network: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole and return its facts; None when there is none yet.

    A damaged one is named in a warning and the one before it is taken. Raises RunError when all are damaged.
    """
    found = numbered(checkpoints)
    for folder in reversed(found):
        try:
            facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
            tensors = load_file(folder / TENSORS)
            network.load_state_dict(_below("network", tensors))
            average.load(_below("average", tensors))
            _load_optimizer(optimizer, tensors)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            log.warning("The checkpoint %s is damaged (%s); trying the one before it.", folder, error)
        else:
            return facts
    if found:
        raise RunError(f"Every checkpoint in {checkpoints} is damaged; delete that folder to start over.")
    return None


def prune(checkpoints: Path, keep: int, *, best: Path | None = None) -> None:
    """Delete all but the newest `keep`; `best`, if given, is first kept under the name `best` (hard links, no copy)."""
    if best is not None:
        with atomic_folder(checkpoints / BEST) as partial:
            shutil.copytree(best, partial, copy_function=os.link, dirs_exist_ok=True)
    for folder in numbered(checkpoints)[:-keep]:
        shutil.rmtree(folder)


def numbered(checkpoints: Path) -> list[Path]:
    """The checkpoints named by the images they saw, oldest first."""
    return sorted((p for p in checkpoints.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below("optimizer", tensors).items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}
