"""A new U-Net, and which layers of a given one are trained."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from limner.config import TrainUnetConfig
from limner.errors import ModelError

NORM_GROUPS = 32  # of Stable Diffusion; fewer where the channels don't divide


def new(config: TrainUnetConfig, *, side: int, latent_channels: int, state_width: int) -> Any:
    """An untrained UNet2DConditionModel of the sizes that `config` sets.

    It draws latents of `side` and `latent_channels`, and attends to token states of `state_width`.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)]
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        # Diffusers calls the number of heads their width; it says so in UNet2DConditionModel.
        attention_head_dim=tuple(c // config.head_width for c in config.channels),
        cross_attention_dim=state_width,
        norm_num_groups=math.gcd(NORM_GROUPS, *config.channels),
    )


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


def freeze_others(network: nn.Module, tune: str) -> None:
    """Leave only what `tune` means to be trained. Raises ModelError as `tuned_layers` does."""
    if tune != "full":  # which is more than layers: norms too
        chosen = tuned_layers(network, tune)
        network.requires_grad_(False)
        for name in chosen:
            network.get_submodule(name).requires_grad_(True)
