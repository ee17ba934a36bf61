"""Stable Diffusion's networks for drawing, of nothing but PyTorch.

Importing Diffusers' and Transformers' classes takes longer than drawing a picture. These have the same weights under
the same names and answer with the same numbers, bit for bit, for the settings that Stable Diffusion 1 and 2 and
Limner's own models have; all others are left to the libraries, and so are all faults, which they name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from limner.models import hub, loading
from limner.models.plain.layers import Network
from limner.models.plain.text import TextEncoder, Tokenizer
from limner.models.plain.unet import UNet
from limner.models.plain.vae import Vae

NETWORKS: dict[str | None, Callable[[Mapping[str, Any]], Network]] = {
    "UNet2DConditionModel": UNet,
    "AutoencoderKL": Vae,
    "CLIPTextModel": TextEncoder,
}
COMPILER = "torch._dynamo"  # the module


def load_unet(ref: str, dtype: torch.dtype | None = None) -> Any:
    """As `loading.load_unet`."""
    return _load(ref, "unet", dtype) or loading.load_unet(ref, dtype)


def load_vae(ref: str, dtype: torch.dtype | None = None) -> Any:
    """As `loading.load_vae`."""
    return _load(ref, "vae", dtype) or loading.load_vae(ref, dtype)


def load_text_encoder(ref: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """As `loading.load_text_encoder`."""
    encoder = _load(ref, "text_encoder", dtype)
    if encoder is None:
        return loading.load_text_encoder(ref, dtype)
    try:
        return encoder, Tokenizer(loading.component(ref, "tokenizer"))
    except Exception:  # whatever is odd about it, as in `_load`
        return encoder, loading.load_tokenizer(ref)


def load_scheduler(ref: str) -> Any:
    """As `loading.load_scheduler`, without PyTorch's compiler, which takes longer to import than all else of it.

    Diffusers marks functions for the compiler that schedulers don't have, and goes on where it can't be imported.
    """
    absent = COMPILER not in sys.modules
    if absent:
        sys.modules[COMPILER] = None  # type: ignore[assignment]
    try:
        import diffusers.utils.torch_utils  # noqa: F401
    finally:
        if absent:
            del sys.modules[COMPILER]
    return loading.load_scheduler(ref)


def _load(ref: str, name: str, dtype: torch.dtype | None) -> Network | None:
    """A network in evaluation mode; None where it is of a kind that is not known here, or can't be read."""
    try:
        folder = loading.component(ref, name)
        weights = {name: tensor for file in hub.weight_files(folder) for name, tensor in load_file(file).items()}
        with torch.device("meta"):
            network = NETWORKS[loading.class_of(folder)](loading.read_config(folder / "config.json"))
        named = {own: weights[name].to(dtype or torch.float32) for name in weights if (own := network.named(name))}
        network.load_state_dict(named, assign=True)
    except Exception as error:  # whatever is odd about it, the libraries' own classes take it or say so
        if loading.is_out_of_memory(error):
            raise
        return None
    return network.eval()
