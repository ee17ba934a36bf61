"""Checkpoints: one safetensors file for weights, average and optimiser, one JSON file for the rest; no pickles.

They hold what a training changes. Frozen weights are those of the model that it began with, and no random state is
stored, since all randomness is a function of (seed, images seen): see `stream.py`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limner.artifacts import PARTIAL, atomic_folder
from limner.errors import RunError
from limner.training.average import WeightAverage

log = logging.getLogger(__name__)

TENSORS, FACTS = "state.safetensors", "state.json"
BEST = "best"
DAMAGE = (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError)  # what reading it may raise


@dataclass(frozen=True)
class Facts:
    """How far a training has come, and how well it did."""

    images: int = 0
    """Images seen."""
    validation: dict[str, float] | None = None
    """Figures of the latest validation."""
    best: float | None = None
    """The least loss of all validations so far."""
    best_at: int | None = None
    """Images seen at that validation."""
    stale: int = 0
    """Validations since then."""

    @property
    def is_best(self) -> bool:
        """Whether these are the weights of the best validation so far."""
        return self.best_at == self.images

    def judged(self, validation: dict[str, float]) -> Self:
        """The same after a validation with these figures, of which `loss` counts."""
        loss = validation["loss"]
        if self.best is None or loss < self.best:
            return replace(self, validation=validation, best=loss, best_at=self.images, stale=0)
        return replace(self, validation=validation, stale=self.stale + 1)


def save(
    checkpoints: Path,
    keep: int,
    network: nn.Module,
    average: WeightAverage,
    optimizer: torch.optim.Optimizer,
    facts: Facts,
) -> None:
    """Write a checkpoint atomically, named by its images; then `tidy`."""
    tensors = _prefixed("network", _trained(network)) | _prefixed("average", average.state())
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= _prefixed(f"optimizer.{number}", state)
    with atomic_folder(_folder(checkpoints, facts)) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
        (partial / FACTS).write_text(json.dumps(asdict(facts)))
    tidy(checkpoints, keep, facts)


def tidy(checkpoints: Path, keep: int, facts: Facts) -> None:
    """Keep the checkpoint of `facts` under the name `best` too where it is that, and delete all but the newest `keep`.

    Those that saw more images than `facts` could not be read, and don't count.

    To be called after `load_newest` as well: a process may have been killed between writing a checkpoint and this,
    which would leave `best` behind what the checkpoint says of it.
    """
    if facts.is_best:
        with atomic_folder(checkpoints / BEST) as partial:  # hard links, no copy
            shutil.copytree(_folder(checkpoints, facts), partial, copy_function=os.link, dirs_exist_ok=True)
    for folder in [p for p in numbered(checkpoints) if int(p.name) <= facts.images][:-keep]:
        shutil.rmtree(folder)
    for folder in checkpoints.glob(f".*{PARTIAL}"):  # of processes that were killed
        shutil.rmtree(folder)


def load_newest(
    checkpoints: Path, network: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer
) -> Facts:
    """Load the newest checkpoint that is whole and return its facts; those of a beginning when there is none yet.

    A damaged one is named in a warning and the one before it is taken. Raises RunError when all are damaged.
    """
    found = numbered(checkpoints)
    for folder in reversed(found):
        try:
            return _load(folder, network, average, optimizer)
        except DAMAGE as error:
            log.warning("The checkpoint %s is damaged (%s); trying the one before it.", folder, error)
    if found:
        raise RunError(f"Every checkpoint in {checkpoints} is damaged; delete that folder to start over.")
    return Facts()


def load_best(checkpoints: Path, network: nn.Module, average: WeightAverage) -> Facts:
    """Load network and average of the best checkpoint and return its facts. Raises RunError when it is damaged."""
    try:
        return _load(checkpoints / BEST, network, average, None)
    except DAMAGE as error:
        raise RunError(
            f"The best checkpoint in {checkpoints} is damaged ({error}); delete that folder to start over."
        ) from None


def numbered(checkpoints: Path) -> list[Path]:
    """The checkpoints named by the images they saw, oldest first."""
    return sorted((p for p in checkpoints.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))


def _folder(checkpoints: Path, facts: Facts) -> Path:
    return checkpoints / f"{facts.images:09d}"


def _trained(network: nn.Module) -> dict[str, Tensor]:
    """What a training changes in a network: the parameters that need a gradient, and the buffers that it saves."""
    parameters = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    saved = network.state_dict().keys()
    return parameters | {name: buffer for name, buffer in network.named_buffers() if name in saved}


def _load(folder: Path, network: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer | None) -> Facts:
    facts = Facts(**json.loads((folder / FACTS).read_text()))
    tensors = load_file(folder / TENSORS)
    _copy(_below("network", tensors), _trained(network))
    _copy(_below("average", tensors), average.state())
    if optimizer is not None:
        _load_optimizer(optimizer, _below("optimizer", tensors))
    return facts


@torch.no_grad()
def _copy(stored: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    if {name: t.shape for name, t in stored.items()} != {name: t.shape for name, t in own.items()}:
        raise ValueError("it is another network's")
    for name, tensor in own.items():
        tensor.copy_(stored[name])


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        value = tensor
        if tensor.ndim:  # else it is a count, or of a scalar
            # Laid out as its parameter is, since fused kernels take both as they lie in memory
            value = torch.empty_like(parameters[int(number)], dtype=tensor.dtype)
            _copy({key: tensor}, {key: value})
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}
