"""What is trained, as a `Task`, and one step of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from limner.config import TrainConfig
from limner.errors import ConfigError
from limner.models import kernels
from limner.training.lanes import Lanes
from limner.training.stream import Stream

RECOMPUTING: dict[str, tuple[Any, ...]] = {
    "enable_gradient_checkpointing": (),  # Diffusers
    "activation_checkpointing_enable": ({"use_reentrant": False},),  # Transformers, and before it had that
    "gradient_checkpointing_enable": ({"use_reentrant": False},),
}
"""What turns recomputing on, by method's name, with its arguments."""


class Task(Protocol):
    """One training: a network, a stream of examples, a loss, and how its result is judged and saved."""

    network: nn.Module
    """What is trained; its forward is what `loss` calls."""
    stream: Stream
    """Its examples."""
    parents: dict[str, str]
    """What the result is made from: the sha256 of data and models by role, for the manifest."""
    facts: dict[str, Any]
    """What the manifest of its finished run says beside."""
    rates: dict[str, float]
    """Shares of the learning rate by parameter's name, where they are not 1."""

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, above zero, and figures worth logging; `batch` is this process's share.

        Where validation counts otherwise, as without weights, `error` among the figures is the loss as it would.
        """

    def validate(self, samples: Path) -> dict[str, float]:
        """Judge the network as it is, and write pictures to look at.

        `loss` is in the answer, and what the configuration counts, which chooses the best checkpoint; `copies`, the
        share of what is drawn that are copies of train pictures, may be. Of several processes only the main one calls
        it.
        """

    def save(self, folder: Path) -> None:
        """Write the network as part of a Diffusers model folder."""


def refuse_other_settings(config: TrainConfig, own: Mapping[str, Any], network: str) -> None:
    """Raise ConfigError where settings of a new network are set beside a model whose `own` they are not.

    One at its default may have been left out, and is let pass.
    """
    for name, value in own.items():
        if getattr(config, name) not in (value, type(config).model_fields[name].default):
            raise ConfigError(f"{name} is for a new {network}, and that of {config.model} keeps its own; leave it out.")


def place(network: nn.Module, accelerator: Accelerator) -> None:
    """Move a network to where it is trained, and ready it for that."""
    # What tensor cores want for convolutions; on CPU it makes no difference (docs/experiments.md).
    network.to(accelerator.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kernels.quicken(network)
    network.train()


def recompute(network: nn.Module) -> None:
    """Let a network of Diffusers or Transformers compute activations again on the way back (Chen et al. 1604.06174).

    Raises ConfigError where it can't.
    """
    for module in network.modules():
        for name, arguments in RECOMPUTING.items():
            enable: Any = getattr(module, name, None)
            if enable is not None:
                enable(*arguments)
                return
    raise ConfigError("This network can't compute its activations again; leave out checkpointing.")


def loss(
    task: Task, network: nn.Module, batch: dict[str, Tensor], *, config: TrainConfig, accelerator: Accelerator
) -> tuple[Tensor, dict[str, Tensor]]:
    """The task's loss and figures in the arithmetic that is set."""
    device = accelerator.device
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return task.loss(network, moved)


def step(
    task: Task,
    lanes: Lanes,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    *,
    rate: float,
    seed: int,
    config: TrainConfig,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """One step of descent at the learning rate `rate`. -> `loss`, `gradient` (its length) and the task's figures.

    `lanes` have the task's network, as it may have been wrapped; `seed` is that of dropout. Where `loss` or `gradient`
    is not finite, the weights have become useless.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]
    torch.manual_seed(seed)
    figures = _accumulate(task, lanes, batch, config, accelerator)
    gradient = accelerator.clip_grad_norm_(lanes.network.parameters(), config.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"gradient": gradient.detach().float(), **figures}


def _accumulate(
    task: Task, lanes: Lanes, batch: dict[str, Tensor], config: TrainConfig, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Put the gradient of a batch in place, `micro_batch_size` images at a time. -> the means of loss and figures."""
    count = len(next(iter(batch.values())))
    means: dict[str, Tensor] = {}

    def learn(network: nn.Module, part: slice) -> tuple[float, dict[str, Tensor]]:
        share = (part.stop - part.start) / count
        some = {name: value[part] for name, value in batch.items()}
        value, figures = loss(task, network, some, config=config, accelerator=accelerator)
        accelerator.backward(share * value)
        return share, {"loss": value.detach(), **figures}

    starts = range(0, count, config.micro_batch_size or count)
    for start in starts:
        parts = lanes.parts(min(starts.step, count - start))
        moved = [slice(start + part.start, start + part.stop) for part in parts]
        # Processes meet once a step, at the last part
        with nullcontext() if start == starts[-1] else accelerator.no_sync(lanes.network):
            found = lanes.learn(learn, moved)
        for share, figures in found:
            for name, figure in figures.items():
                means[name] = means.get(name, 0) + share * figure.detach().float()
    return means
