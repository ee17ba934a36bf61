"""Parts of a batch are learned side by side on a CPU: of a small network, each core takes a part of its own.

With all cores at each layer, every one of some hundred layers waits for the last of them (docs/experiments.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from itertools import pairwise
from typing import Self, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from limner.config import TrainConfig
from limner.models import layers
from limner.threads import pool_of

SMALL = 50_000_000  # parameters, above which the layers keep all cores busy, and gradients for each would be large
LEAST = 8  # images that are worth a lane

R = TypeVar("R")


class Lanes:
    """A network, and for each further lane a copy that has its weights, but gradients of its own."""

    def __init__(self, network: nn.Module, count: int = 1) -> None:
        self.network, self._count = network, count
        self._networks = [network]

    @classmethod
    def of(cls, network: nn.Module, config: TrainConfig, accelerator: Accelerator) -> Self:
        """As many lanes as there are cores, where parts of a batch may be learned apart; or else one."""
        return cls(network, lanes_for(network, config, accelerator))

    def parts(self, count: int) -> list[slice]:
        """How the images of a batch of `count` are shared out."""
        lanes = max(1, min(self._count, count // LEAST))
        ends = [count * number // lanes for number in range(lanes + 1)]
        return [slice(start, end) for start, end in pairwise(ends)]

    def learn(self, act: Callable[[nn.Module, slice], R], parts: Sequence[slice]) -> list[R]:
        """What `act` returns for each part, while the gradients that it leaves come together in `network`."""
        if len(parts) == 1:
            return [act(self.network, parts[0])]
        while len(self._networks) < len(parts):
            self._networks.append(_twin(self.network))
        pool = pool_of(len(parts), torch.get_num_threads() // len(parts))
        begun = [pool.submit(act, network, part) for network, part in zip(self._networks, parts)]
        wait(begun)
        found = [future.result() for future in begun]
        for twin in self._networks[1 : len(parts)]:
            _hand_over(twin, self.network)
        return found


def lanes_for(network: nn.Module, config: TrainConfig, accelerator: Accelerator) -> int:
    """How many lanes a training has. One where its loss is no mean over images, or an image's depends on others or on
    the order of what is drawn by lot, as by batch norm and PyTorch's dropout."""
    apart = "chunk_size" not in type(config).model_fields and not config.compile
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    small = sum(parameter.numel() for parameter in network.parameters()) <= SMALL
    mixed = any(
        isinstance(layer, _BatchNorm)
        or (isinstance(layer, _DropoutNd) and layer.p > 0 and not isinstance(layer, layers.Dropout))
        for layer in network.modules()
    )
    return torch.get_num_threads() if apart and alone and small and not mixed else 1


def _twin(network: nn.Module) -> nn.Module:
    twin = copy.deepcopy(network)
    for own, other in zip(network.parameters(), twin.parameters(), strict=True):
        other.data = own.data
    return twin


def _hand_over(twin: nn.Module, network: nn.Module) -> None:
    """Add a copy's gradients to the network's."""
    pairs = zip(twin.parameters(), network.parameters(), strict=True)
    both: list[tuple[Tensor, Tensor]] = []
    for other, own in pairs:
        if other.grad is not None and own.grad is not None:
            both.append((own.grad, other.grad))
        elif other.grad is not None:
            own.grad = other.grad
        other.grad = None
    if both:
        torch._foreach_add_(*(list(side) for side in zip(*both)))
