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

from limner.artifacts import atomic_folder, sha256, write_text
from limner.errors import ModelError, RunError
from limner.training.average import WeightAverage
from limner.training.optimizers import COUNTS, TABLES

log = logging.getLogger(__name__)

TENSORS, FACTS = "state.safetensors", "state.json"
BEST = "best"
NEWEST = "newest"  # a file with the name of the checkpoint that was written last
OVERFIT = 3  # validations in a row at which the losses of validation and training drew apart
DAMAGE = (FileNotFoundError, ValueError, TypeError, LookupError, SafetensorError)
"""What reading a damaged checkpoint may raise; a lack of memory or of rights says nothing of it."""


@dataclass(frozen=True)
class Facts:
    """How far a training has come, and how well it did."""

    images: int = 0
    """Images seen."""
    validation: dict[str, float] | None = None
    """Figures of the latest validation."""
    best: float | None = None
    """The least of the figure that counts, the loss or another, of all validations so far."""
    best_at: int | None = None
    """Images seen at that validation."""
    stale: int = 0
    """Validations since then."""
    steps: int = 0
    """Steps since the latest validation."""
    summed: float = 0.0
    """Sum of their training losses, as validation counts them."""
    trained: float | None = None
    """Mean training loss of the steps before the latest validation, back to the one before it."""
    widening: int = 0
    """Validations in a row at which the loss of validation had risen and that of training fallen; from `OVERFIT` on it
    only grows."""

    def trained_on(self, images: int, loss: float) -> Self:
        """The same after a step of so many images, whose training loss this was."""
        return replace(self, images=self.images + images, steps=self.steps + 1, summed=self.summed + loss)

    @property
    def is_best(self) -> bool:
        """Whether these are the weights of the best validation so far."""
        return self.best_at == self.images

    def judged(self, validation: dict[str, float], counted: str = "loss") -> Self:
        """The same after a validation with these figures, of which `counted` tells the best by being least."""
        loss = validation["loss"]
        trained = self.summed / self.steps if self.steps else None
        widens = (
            self.validation is not None
            and loss > self.validation["loss"]
            and self.trained is not None
            and trained is not None
            and trained < self.trained
        )
        widening = self.widening + 1 if widens or self.widening >= OVERFIT else 0
        now = replace(self, validation=validation, steps=0, summed=0.0, trained=trained, widening=widening)
        if self.best is None or validation[counted] < self.best:
            return replace(now, best=validation[counted], best_at=self.images, stale=0)
        return replace(now, stale=self.stale + 1)

    @property
    def gap(self) -> float | None:
        """By how much the latest validation's loss is above the mean training loss of the steps before it."""
        if self.validation is None or self.trained is None:
            return None
        return self.validation["loss"] - self.trained

    @property
    def copies(self) -> float:
        """Share of what the latest validation drew that are copies of train pictures; 0 where none are looked for."""
        return (self.validation or {}).get("copies", 0.0)

    @property
    def begins_to_overfit(self) -> bool:
        """Whether the latest validation is the one to warn at, which comes once in a training."""
        return self.widening == OVERFIT


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
    for number, parameter in enumerate(_parameters(optimizer)):
        state = {name: torch.as_tensor(value) for name, value in optimizer.state.get(parameter, {}).items()}
        # Parameters share some tables of bitsandbytes', and safetensors take nothing twice
        state |= {name: state[name].clone() for name in TABLES if name in state}
        tensors |= _prefixed(f"optimizer.{number}", state)
    for number, group in enumerate(optimizer.param_groups):
        counts = {name: torch.tensor(float(group[name]), dtype=torch.float64) for name in COUNTS if name in group}
        tensors |= _prefixed(f"group.{number}", counts)
    with atomic_folder(_folder(checkpoints, facts)) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
        stored = {**asdict(facts), "sha256": sha256(partial / TENSORS)}
        (partial / FACTS).write_text(json.dumps(stored))
    write_text(checkpoints / NEWEST, _folder(checkpoints, facts).name)
    tidy(checkpoints, keep, facts)


def tidy(checkpoints: Path, keep: int, facts: Facts) -> None:
    """Keep the checkpoint of `facts` under the name `best` too where it is that, and delete all but the newest `keep`.

    Those that saw more images than `facts` could not be read, and don't count.

    To be called after `load_newest` as well: a process may have been killed between writing a checkpoint and this,
    which would leave `best` behind what the checkpoint says of it.
    """
    if facts.is_best:
        with atomic_folder(checkpoints / BEST) as partial:
            for file in _folder(checkpoints, facts).iterdir():
                try:
                    os.link(file, partial / file.name)
                except OSError:  # a file system without hard links
                    shutil.copyfile(file, partial / file.name)
    for folder in [p for p in numbered(checkpoints) if int(p.name) <= facts.images][:-keep]:
        shutil.rmtree(folder)


def load_newest(
    checkpoints: Path, network: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer
) -> Facts:
    """Load the newest checkpoint that is whole and return its facts; those of a beginning when there is none yet.

    One that is damaged or gone is named in a warning and the one before it is taken. Raises RunError when all are
    damaged.
    """
    found = numbered(checkpoints)
    newest = checkpoints / NEWEST
    if newest.exists() and newest.read_text() not in [folder.name for folder in found]:
        log.warning("The checkpoint %s is gone; trying the one before it.", checkpoints / newest.read_text())
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


@torch.no_grad()
def load_average(folder: Path, unet: nn.Module) -> None:
    """Put the weight average of a checkpoint of `train unet` into a U-Net that has the frozen weights already.

    Raises ModelError where it is damaged, or another network's.
    """
    try:
        tensors = load_file(folder / TENSORS)
        aligned = any(name.startswith("network.unet.") for name in tensors)  # with a map, whose weights come behind
        prefix = "network.unet." if aligned else "network."
        trained = [p for name, p in unet.named_parameters() if f"{prefix}{name}" in tensors]
        for number, parameter in enumerate(trained):
            _copy({"": tensors[f"average.{number}"]}, {"": parameter})
    except DAMAGE as error:
        raise ModelError(f"The checkpoint {folder} can't be drawn with ({error}); delete it.") from None


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
    stored = json.loads((folder / FACTS).read_text())
    digest = stored.pop("sha256", None)  # which older versions did not store
    facts = Facts(**stored)
    if digest is not None and sha256(folder / TENSORS) != digest:
        raise ValueError(f"{TENSORS} is not as it was written")
    tensors = load_file(folder / TENSORS)
    _copy(_below("network", tensors), _trained(network))
    _copy(_below("average", tensors), average.state())
    if optimizer is not None:
        _load_optimizer(optimizer, _below("optimizer", tensors), _below("group", tensors))
    return facts


@torch.no_grad()
def _copy(stored: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    if {name: t.shape for name, t in stored.items()} != {name: t.shape for name, t in own.items()}:
        raise ValueError("it is another network's")
    for name, tensor in own.items():
        tensor.copy_(stored[name])


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Those that an optimiser moves, in the order of the numbers of its state."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], counts: dict[str, Tensor]) -> None:
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Tensor | float]] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        value: Tensor | float = tensor
        if tensor.dtype == torch.int64:  # a count that was no tensor
            value = tensor.item()
        elif tensor.ndim and key not in TABLES:  # else it is a count, or of a scalar
            # Laid out as its parameter is, since fused kernels take both as they lie in memory
            value = torch.empty_like(parameters[int(number)], dtype=tensor.dtype)
            _copy({key: tensor}, {key: value})
        state.setdefault(int(number), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    for name, tensor in counts.items():
        number, key = name.split(".", 1)
        groups[int(number)][key] = tensor.item()
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}
