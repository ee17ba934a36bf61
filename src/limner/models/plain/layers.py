"""What the networks are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from limner.models.bare import Convolution, GroupNorm, Linear


class Layers(nn.Module):
    """Layers by their names in the files, and facts about them."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.ModuleList(part) if isinstance(part, list) else part)

    if TYPE_CHECKING:  # which layers there are, names alone say

        def __getattr__(self, name: str) -> Any: ...


class Network(Layers):
    """A whole network with its settings."""

    config: Any

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.parameters()).device

    def named(self, name: str) -> str | None:
        """What a weight is called here that a file calls `name`; None where it is none."""
        return name


def new_resnet(inputs: int, outputs: int, groups: int, eps: float, time: int | None = None) -> Layers:
    """ResnetBlock2D, whose embeddings of the timestep are `time` wide where there are some."""
    return Layers(
        norm1=GroupNorm(groups, inputs, eps),
        conv1=Convolution(inputs, outputs, 3, padding=1),
        norm2=GroupNorm(groups, outputs, eps),
        conv2=Convolution(outputs, outputs, 3, padding=1),
        conv_shortcut=None if inputs == outputs else Convolution(inputs, outputs, 1),
        **({} if time is None else {"time_emb_proj": Linear(time, outputs)}),
    )


def new_attention(width: int, seen: int, heads: int, *, bias: bool = False) -> Layers:
    """Attention of tokens of one width to those of another."""
    return Layers(
        to_q=Linear(width, width, bias=bias),
        to_k=Linear(seen, width, bias=bias),
        to_v=Linear(seen, width, bias=bias),
        to_out=[Linear(width, width)],
        heads=heads,
    )
