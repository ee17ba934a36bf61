"""A linear map on a CLIP's token states, and how it becomes part of the U-Net that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.errors import ModelError
from limner.models import loading

FILE = "adapter.safetensors"


def find(clip: str) -> Path | None:
    """The folder of the map that was trained with the CLIP of `clip`, where there is one. Raises ModelError."""
    if "clip" not in loading.parts_in(loading.resolve(clip)):  # a Stable Diffusion folder has none
        return None
    folder = loading.component(clip, "clip").parent / "adapter"
    return folder if (folder / FILE).is_file() else None


def load(folder: Path, width: int) -> Tensor:
    """The map of token states of that `width` -> (D, D), float32. Raises ModelError."""
    from safetensors.torch import load_file

    with loading.reading("adapter", folder):
        weight = load_file(folder / FILE)["weight"].float()  # (D, D)
    if weight.shape != (width, width):
        shape = "x".join(map(str, weight.shape))
        raise ModelError(f"The adapter in {folder} is {shape} where token states are {width} wide; train it again.")
    return weight


@torch.no_grad()
def fold(unet: Any, weight: Tensor) -> None:
    """Make `unet` read plain token states as it read adapted ones, in place; `weight` is (D, D).

    The map takes each token state s (D,) to A s; to train one over a frozen CLIP is the idea of Zarei et al.
    (2406.07844). Cross attention reads s through its keys W_k s and values W_v s alone, which are linear, so that

        W_k (A s) = (W_k A) s  and  W_v (A s) = (W_v A) s,

    and W_k A, W_v A in place of W_k, W_v spare the pipeline a part that plain Diffusers does not know. Holds for
    U-Nets whose cross attention reads the states themselves, as all of Stable Diffusion's do.
    """
    from diffusers.models.attention_processor import Attention

    for module in unet.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            for layer in (module.to_k, module.to_v):
                layer.weight.copy_(layer.weight @ weight)  # (inner, D)
