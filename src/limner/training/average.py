"""The exponential moving average of the weights, which is what a training saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RAMP = 0.05  # while fewer images than halflife/RAMP were seen, the half-life is this share of them (EDM2)


class WeightAverage:
    """Averages the trained parameters of a network with a half-life counted in images; 0 follows them without lag."""

    def __init__(self, network: nn.Module, halflife: float) -> None:
        self.halflife = halflife
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, images: int, seen: int, weights: list[Tensor] | None = None) -> None:
        """Take in the current weights, or these in their place, after a step of `images`, `seen` in all."""
        halflife = min(self.halflife, seen * RAMP)
        keep = 0.5 ** (images / halflife) if halflife else 0.0
        torch._foreach_lerp_(self.averages, weights or [p.detach() for p in self.parameters], 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in the network's place for as long as the block runs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """The averages by number, for a checkpoint; what is written into them is taken over."""
        return {str(number): average for number, average in enumerate(self.averages)}
