"""Convolutions whose weights lie as the processor reads them, where torch would rearrange them at each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PackedConv(nn.Module):
    """A Conv2d on a CPU, for drawing alone."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.settings: list[Any] = [list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups]
        # Both operators are those that torch's own compiler writes. No shape of the input is named, since bits of a
        # picture should not depend on which sizes were drawn before.
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(conv.weight.detach().to_mkldnn(), *self.settings)
        self.bias = None if conv.bias is None else conv.bias.detach()

    def forward(self, given: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        convolution = torch.ops.mkldnn._convolution_pointwise
        result: Tensor = convolution(given, self.weight, self.bias, *self.settings, "none", [], "")
        return result


def pack(network: nn.Module) -> None:
    """Replace the convolutions of a network; it can't be trained or saved any more."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and child.padding_mode == "zeros" and not isinstance(child.padding, str):
                setattr(parent, name, PackedConv(child))
