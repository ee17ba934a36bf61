"""Layers that call PyTorch's kernels and do nothing else, for drawing.

What torch.nn.Module does around them, hooks above all, takes a small network as long as some of its layers. All of it
is Python, and so what networks that draw side by side wait for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FEW = 1024  # places, below which PyTorch's group norm is slow where the channels lie last: tenfold in bf16


def lay_bare(network: nn.Module) -> None:
    """Let a network be called faster, on the same weights; hooks on its layers are not called from then on."""
    for layer in network.modules():
        altered = "forward" in vars(layer) or getattr(layer, "padding_mode", "zeros") != "zeros"
        if type(layer) in LAYERS and not altered:
            layer.__class__ = LAYERS[type(layer)]


class Empty:
    """A layer whose weights come from a file, and are nothing before."""

    def reset_parameters(self) -> None:
        """Leave them as they are."""


class Linear(Empty, nn.Linear):
    """(..., C) -> (..., C')."""

    def __call__(self, x: Tensor) -> Tensor:
        own: Any = self._parameters  # attributes of a module are looked for at length
        return nn.functional.linear(x, own["weight"], own["bias"])


class Convolution(Empty, nn.Conv2d):
    """(N, C, H, W) -> (N, C', H', W')."""

    def __call__(self, x: Tensor) -> Tensor:
        own: Any = self._parameters
        return torch.conv2d(x, own["weight"], own["bias"], self.stride, self.padding, self.dilation, self.groups)


class LayerNorm(Empty, nn.LayerNorm):
    """(..., C) -> (..., C)."""

    def __call__(self, x: Tensor) -> Tensor:
        own: Any = self._parameters
        return torch.layer_norm(x, self.normalized_shape, own["weight"], own["bias"], self.eps)


class GroupNorm(Empty, nn.GroupNorm):
    """(N, C, ...) -> (N, C, ...)."""

    def __call__(self, x: Tensor) -> Tensor:
        own: Any = self._parameters
        if x.device.type == "cpu" and x.shape[2:].numel() < FEW:
            x = x.contiguous()
        return torch.group_norm(x, self.num_groups, own["weight"], own["bias"], self.eps)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Conv2d: Convolution,
    nn.LayerNorm: LayerNorm,
    nn.GroupNorm: GroupNorm,
}
