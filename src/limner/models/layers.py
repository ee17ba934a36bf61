"""Which layers of a given U-Net are trained, how they attend, and what they drop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limner.errors import ModelError

FEW = 32  # latents a side


def tuned_layers(network: nn.Module, tune: str) -> list[str]:
    """Names of the linear maps and convolutions of a U-Net that `tune` means: `full`, `attention` for the projections
    of attention, `cross_attention_kv` for keys and values of what attends to token states.

    Custom Diffusion tunes the last of them (Kumari et al. 2212.04488, section 3.2). Raises ModelError where there
    are none.
    """
    from diffusers.models.attention_processor import Attention

    if tune == "full":
        return [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    chosen = [
        f"{place}.{name}"
        for place, block in network.named_modules()
        if isinstance(block, Attention)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
        and (tune == "attention" or (block.is_cross_attention and name in ("to_k", "to_v")))
    ]
    if not chosen:
        raise ModelError("The U-Net has no such attention; train it with tune=full.")
    return chosen


def attend_plainly(unet: Any) -> None:
    """Let a U-Net of few tokens attend by plain products of matrices.

    In bf16 on a CPU these take much less time than the fused kernel: all of a training step a fifth less for 64 tokens
    and less (docs/experiments.md). What they need beside is memory for the square of the tokens.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    size = unet.config["sample_size"]
    if (size if isinstance(size, int) else max(size)) <= FEW:
        for block in unet.modules():
            if isinstance(getattr(block, "processor", None), AttnProcessor2_0):
                block.set_processor(AttnProcessor())


class Dropout(nn.Dropout):
    """Leaves out what an image's own seed says, and so the same whatever images are beside it.

    On a GPU, where each image's own draw would be a kernel, and without seeds torch's generator says it for all.
    """

    number: int
    """Which one of its network it is."""
    seeds: Sequence[int] = ()
    """One for each image."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, ...)."""
        plain = x.device.type != "cpu" or torch.compiler.is_compiling() or not self.seeds
        if plain or not self.training or not 0 < self.p < 1:
            return super().forward(x)
        kept = torch.empty(x.shape, dtype=x.dtype)
        for own, seed in zip(kept, self.seeds, strict=True):
            own.bernoulli_(1 - self.p, generator=torch.Generator().manual_seed(seed + self.number))
        return x * kept.div_(1 - self.p)


def drop_out(network: nn.Module, share: float) -> None:
    """Leave out this share of what the dropout layers of a network let through, as long as it trains."""
    found = [layer for layer in network.modules() if isinstance(layer, nn.Dropout)]
    for number, layer in enumerate(found):
        layer.__class__ = Dropout
        assert isinstance(layer, Dropout)
        layer.p, layer.number = share, number


def drop_by(network: nn.Module, seeds: Tensor) -> None:
    """Say which activations of the images to come are dropped: those of seeds (N,), where these are on a CPU."""
    for layer in network.modules():
        if isinstance(layer, Dropout):
            layer.seeds = seeds.tolist() if seeds.device.type == "cpu" else ()


def freeze_others(network: nn.Module, tune: str) -> None:
    """Leave only what `tune` means to be trained. Raises ModelError as `tuned_layers` does."""
    if tune != "full":  # which is more than layers: norms too
        chosen = tuned_layers(network, tune)
        network.requires_grad_(False)
        for name in chosen:
            network.get_submodule(name).requires_grad_(True)
