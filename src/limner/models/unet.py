"""A new U-Net."""

from __future__ import annotations

import math
from typing import Any

import torch

from limner.config import TrainUnetConfig

NORM_GROUPS = 32  # of Stable Diffusion; fewer where the channels don't divide
GUIDANCE_WIDTH = 256  # of what a U-Net reads of the guidance scale, as latent consistency models have it


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


def settings_of(unet: Any) -> dict[str, Any]:
    """What of the settings `new` would be given for a U-Net of these sizes; one that they can't express has None."""
    channels = tuple(unet.config["block_out_channels"])
    heads = unet.config["attention_head_dim"]
    widths = {c // h for c, h in zip(channels, heads if isinstance(heads, list | tuple) else [heads] * len(channels))}
    return {
        "channels": channels,
        "layers": unet.config["layers_per_block"],
        "attention": tuple("Attn" in name for name in unet.config["down_block_types"]),
        "head_width": widths.pop() if len(widths) == 1 else None,
    }


def with_guidance(unet: Any) -> Any:
    """A copy of a U-Net that takes the guidance scale as an input, and answers as it did until it has learned to."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    width = unet.config.get("time_cond_proj_dim") or GUIDANCE_WIDTH
    student = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=width)
    weights = unet.state_dict()
    reads = student.time_embedding.cond_proj.weight
    weights.setdefault("time_embedding.cond_proj.weight", torch.zeros_like(reads))
    student.load_state_dict(weights)
    return student
