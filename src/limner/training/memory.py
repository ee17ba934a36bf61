"""How much memory a training needs, how much there is, and how much it has taken."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from limner import system
from limner.config import TrainConfig
from limner.errors import RunError
from limner.models import loading
from limner.training.lanes import Lanes
from limner.training.task import Task, loss

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
STATE = {"adamw": 8, "muon": 4, "schedule-free": 8, "adamw-8bit": 2}  # bytes of an optimiser's state, a trained weight


@dataclass(frozen=True)
class Need:
    """Bytes that a process needs to train; activations are those of the images it holds at once."""

    trained: int
    """Weights that are trained."""
    frozen: int
    """Weights that stay as they are."""
    gradients: int
    """Of the trained weights, in each lane."""
    optimizer: int
    """The optimiser's state."""
    activations: int
    """What is kept from the loss to its gradient."""

    @classmethod
    def of(cls, task: Task, config: TrainConfig, accelerator: Accelerator) -> Self:
        """Count what is on the device, and measure the activations of an image, alone and twice; more are made of that.

        The network must have been placed. No weight and no buffer moves.
        """
        parameters = list(task.network.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        batch = next(task.stream.batches(0, 1, 1))
        twice = {name: torch.cat([value, value]) for name, value in batch.items()}
        one, two = (_kept(task, images, config, accelerator) for images in (batch, twice))
        activations = one + (held(config, accelerator) - 1) * max(two - one, 0)
        frozen = sum(p.numel() for p in parameters) - trained
        lanes = Lanes.of(task.network, config, accelerator).parts(held(config, accelerator))
        return cls(4 * trained, 4 * frozen, 4 * trained * len(lanes), STATE[config.optimizer] * trained, activations)

    @property
    def lasting(self) -> int:
        """Bytes of weights, their gradients, their average, and the optimiser's state."""
        return 2 * self.trained + self.frozen + self.gradients + self.optimizer

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: weights, average and optimiser."""
        return 2 * self.trained + self.optimizer

    def warn(self, config: TrainConfig, accelerator: Accelerator) -> None:
        """Say so where there is less memory than that; the weights are already there."""
        if not accelerator.is_main_process:
            return
        there = free(accelerator) + self.trained + self.frozen
        if self.lasting + self.activations > there:
            log.warning(
                "This training needs about %s of memory, and %s are there: %s for weights, gradients, %s and average, "
                "%s for activations of %s images; %s.",
                *(megabytes(value) for value in (self.lasting + self.activations, there, self.lasting)),
                config.optimizer,
                megabytes(self.activations),
                held(config, accelerator),
                remedies(config, accelerator),
            )


def held(config: TrainConfig, accelerator: Accelerator) -> int:
    """Images that a process holds activations of at once."""
    return min(config.held, config.batch_size // accelerator.num_processes)


def remedies(config: TrainConfig, accelerator: Accelerator) -> str:
    """What of the settings would need less memory, as the end of a sentence."""
    chunks = "chunk_size" if "chunk_size" in type(config).model_fields else "micro_batch_size"
    cuda = accelerator.device.type == "cuda"
    smaller = "adamw-8bit" if cuda else "muon"
    found = [
        *([f"{chunks} below {images}"] if (images := held(config, accelerator)) > 1 else []),
        *([] if config.checkpointing else ["checkpointing=true"]),
        *(["precision=bf16"] if config.precision == "fp32" else []),
        *([f"optimizer={smaller}"] if STATE[config.optimizer] > STATE[smaller] else []),
    ]
    return f"what would need less: {', '.join(found)}" if found else "train a smaller model, or with smaller pictures"


@contextmanager
def shortage(config: TrainConfig, accelerator: Accelerator) -> Iterator[None]:
    """Raise RunError with what would help where memory does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_short(error):
            raise
        images = held(config, accelerator)
        raise RunError(
            f"Memory does not suffice for {images} images at once; {remedies(config, accelerator)}."
        ) from None


def is_short(error: Exception) -> bool:
    """Whether an error says that memory does not suffice; on a CPU PyTorch has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or loading.is_out_of_memory(error)


def free(accelerator: Accelerator) -> int:
    """Bytes that this process may yet take of its GPU's memory, or of the machine's."""
    if accelerator.device.type == "cuda":
        return torch.cuda.mem_get_info(accelerator.device)[0]
    return system.memory().free // accelerator.num_processes


def keep_freed() -> None:
    """Let the C library keep what a step frees for the next one, for the rest of the process.

    glibc maps large blocks anew each time, and Linux clears them page by page: an eighth of a step on a CPU, whose
    activations are large blocks (docs/experiments.md). No bit of a result changes. Other libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def peak(accelerator: Accelerator) -> int | None:
    """The most bytes that this process has taken so far: of its GPU's memory, or all that it has resident."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    return proc("/proc/self/status", "VmHWM")


def proc(file: str, name: str) -> int | None:
    """A figure of Linux's /proc in bytes; None on other systems."""
    if not Path(file).exists():
        return None
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == f"{name}:"), None)


def megabytes(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e6:,.0f} MB"


def _kept(task: Task, batch: dict[str, Tensor], config: TrainConfig, accelerator: Accelerator) -> int:
    """Bytes of all that autograd keeps from the loss of a batch to its gradient, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in task.network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()  # once, however many views of it there are
        return tensor

    with _buffers_kept(task.network), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value, _ = loss(task, task.network, batch, config=config, accelerator=accelerator)
    del value  # until here its graph held what was counted
    return sum(size for address, size in kept.items() if address not in weights)


@contextmanager
def _buffers_kept(network: nn.Module) -> Iterator[None]:
    """Put buffers back as they were, which batch norm writes to."""
    before = [buffer.clone() for buffer in network.buffers()]
    yield
    for buffer, kept in zip(network.buffers(), before, strict=True):
        buffer.copy_(kept)
