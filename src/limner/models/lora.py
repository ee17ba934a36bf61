"""Low-rank additions to a model's weights (LoRA: Hu et al. 2106.09685; DoRA: Liu et al. 2402.09353): new, saved, fused.

Two layouts of names go round: Diffusers', and that of kohya's scripts, which A1111 and ComfyUI read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor, nn

from limner.config import TrainLoraConfig
from limner.errors import ConfigError, ModelError
from limner.models import loading
from limner.models.layers import tuned_layers

FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya_lora.safetensors"
ALTERED = ("unet", "text_encoder")
ADAPTER = "default"  # PEFT's name for additions, which no file has
IN_KOHYA = re.compile(r"lora_[^.]+\.(lora_down\.weight|lora_up\.weight|alpha)")
IN_PEFT = re.compile(r"(?P<layer>.+)\.lora_(?P<part>A\.weight|B\.weight|magnitude_vector)")


def require_peft() -> Any:
    """PEFT, the library. Raises ConfigError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise ConfigError("LoRA needs PEFT; install with: pip install 'limner[train]'.") from None
    return peft


# ---- training


def add(unet: Any, config: TrainLoraConfig) -> None:
    """Add low-rank matrices to the layers of `config.tune`, in place; they begin as zero, and PEFT freezes all else.

    Raises ModelError where there are no such layers, ConfigError without PEFT.
    """
    settings = require_peft().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        target_modules=tuned_layers(unet, config.tune),
        use_dora=config.dora,
    )
    unet.add_adapter(settings, ADAPTER)


def save(unet: Any, folder: Path, about: dict[str, str]) -> None:
    """Write `folder/pytorch_lora_weights.safetensors`, which Diffusers loads, and `folder/kohya_lora.safetensors`.

    `about` goes into the heads of both. DoRA has no second file: A1111 scales columns where PEFT scales rows, and
    ComfyUI measures a row before the addition.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from diffusers.utils import convert_state_dict_to_kohya

    settings = unet.peft_config[ADAPTER]
    # Its default asks the hub whether embeddings were changed
    found = require_peft().get_peft_model_state_dict(unet, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors = {f"unet.{name}": tensor.cpu().contiguous() for name, tensor in found.items()}
    # Only these, as another PEFT may know less than this one
    kept = {
        "unet.r": settings.r,
        "unet.lora_alpha": settings.lora_alpha,
        "unet.use_dora": settings.use_dora,
        "unet.target_modules": sorted(settings.target_modules),
    }
    _write(folder / FILE, tensors, {LORA_ADAPTER_METADATA_KEY: json.dumps(kept), **about})
    if not settings.use_dora:
        kohya = convert_state_dict_to_kohya(tensors)
        for name in kohya:
            if name.endswith(".alpha"):  # where Diffusers puts the rank
                kohya[name] = torch.tensor(float(settings.lora_alpha))
        sizes = {"ss_network_dim": str(settings.r), "ss_network_alpha": f"{settings.lora_alpha:g}"}
        _write(folder / KOHYA_FILE, kohya, {**sizes, **about})


def _write(file: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a safetensors file whose head has its entries in this order; the library's own is another each time."""
    content = serialised(tensors)
    end = 8 + int.from_bytes(content[:8], "little")
    head = json.dumps({"__metadata__": {"format": "pt", **about}, **json.loads(content[8:end])}).encode()
    head += b" " * (-len(head) % 8)
    file.write_bytes(len(head).to_bytes(8, "little") + head + content[end:])


# ---- drawing


@dataclass(frozen=True)
class Lora:
    """A file of low-rank additions, and the weight that they are added with."""

    ref: str
    """What the user calls it: the file, or the folder of a training that wrote it."""
    file: Path
    weight: float


def find(text: str) -> Lora:
    """The LoRA that FILE or FILE:WEIGHT means; FILE may also be a run of `train lora`.

    Raises ModelError where there is none that can be read, ConfigError for a weight that is no finite number.
    """
    ref, _, tail = text.rpartition(":")
    weight = _number(tail) if ref else None
    if weight is None:
        ref, weight = text, 1.0
    if not math.isfinite(weight):
        raise ConfigError(f"The weight of the LoRA {ref} must be a finite number, not {weight}.")
    file = next((place for place in (Path(ref) / FILE, Path(ref) / "model" / FILE) if place.is_file()), Path(ref))
    if file.is_dir():
        raise ModelError(f"{ref} holds no {FILE}; name a LoRA's file, or a finished run of train lora.")
    if not file.exists():
        raise ModelError(f"There is no LoRA {ref}; name a safetensors file, or a run of train lora.")
    if not loading.tensor_names(file, "LoRA"):
        raise ModelError(f"The LoRA {file} is empty; fetch or make it again.")
    return Lora(ref, file, weight)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@torch.no_grad()
def fuse(loras: Iterable[Lora], name: str, network: Any) -> None:
    """Add LoRAs to the weights of a network, the `unet` or the `text_encoder`, one after the other.

    Drawing then costs no more than without. Raises ModelError that names what doesn't fit, ConfigError without PEFT.
    """
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Loader
    from diffusers.utils import recurse_remove_peft_layers, set_weights_and_activate_adapters

    peft = require_peft()
    into = {"unet": Loader.load_lora_into_unet, "text_encoder": Loader.load_lora_into_text_encoder}[name]
    for lora in loras:
        tensors, settings = _read(lora.file)
        if not _changes(lora.file, tensors, name, network) or lora.weight == 0:
            continue  # at 0 even the rows of a DoRA then keep their length
        with loading.reading("LoRA", lora.file):
            own = {key: value for key, value in settings.items() if key.startswith(f"{name}.")}
            into(tensors, None, network, adapter_name=ADAPTER, metadata=own or None)
            set_weights_and_activate_adapters(network, [ADAPTER], [lora.weight])
            for layer in network.modules():
                if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                    layer.merge()
            recurse_remove_peft_layers(network)
        del network.peft_config
        network._hf_peft_config_loaded = False


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a LoRA by Diffusers' names, `unet.` or another network's before each, and PEFT's settings.

    kohya's alphas are multiplied in, as Diffusers mixes them up where they differ. Raises ModelError.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    tensors: dict[str, Tensor] = {name: tensor.float() for name, tensor in load_file(file).items()}
    if not all(name.startswith("lora_") for name in tensors):
        with loading.reading("LoRA", file), safe_open(file, framework="pt") as opened:
            return tensors, json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    if other := [name for name in tensors if not IN_KOHYA.fullmatch(name)]:
        raise ModelError(
            f"The LoRA {file} has {other[0]}, which Limner does not read; choose a plain LoRA, or Diffusers' layout."
        )
    for name in [name for name in tensors if name.endswith(".alpha")]:
        layer, alpha = name.removesuffix(".alpha"), tensors.pop(name)
        up, down = (tensors.get(f"{layer}.lora_{part}.weight") for part in ("up", "down"))
        if up is None or down is None:
            raise ModelError(f"The LoRA {file} lacks a half of {layer}; fetch or make it again.")
        up *= alpha / len(down)
    with loading.reading("LoRA", file):
        return StableDiffusionLoraLoaderMixin.lora_state_dict(tensors)[0], {}


def _changes(file: Path, tensors: dict[str, Tensor], name: str, network: Any) -> bool:
    """Whether a LoRA changes a network. Raises ModelError that names the first of its tensors that doesn't fit."""

    def refuse(what: str) -> ModelError:
        return ModelError(f"The LoRA {file} is not for this model ({what}); choose one that was made for its kind.")

    if other := [changed for changed in tensors if changed.partition(".")[0] not in ALTERED]:
        raise refuse(f"it changes {other[0]}, which is not there")
    own = {changed.partition(".")[2]: tensor for changed, tensor in tensors.items() if changed.startswith(f"{name}.")}
    if not own:
        return False
    layers: dict[str, nn.Module] = dict(network.named_modules())
    with loading.reading("LoRA", file):
        named = _in_peft(name, own, layers)
    for changed, tensor in named.items():
        found = IN_PEFT.fullmatch(changed)
        weight = getattr(layers.get(found["layer"]), "weight", None) if found else None
        if found is None or weight is None or weight.ndim < 2:
            raise refuse(f"it changes {changed} of the {loading.NOUNS[name]}, which is not there")
        if not _matches(found["part"], tensor, weight):
            raise refuse(f"{changed} is of shape {tuple(tensor.shape)}, for weights of shape {tuple(weight.shape)}")
    return True


def _matches(part: str, tensor: Tensor, weight: Tensor) -> bool:
    """Whether A (R, I, ...), B (O, R, ...) or the magnitudes (O,) are for weights (O, I, ...)."""
    if part == "A.weight":
        return tensor.shape[1:] == weight.shape[1:]
    return tensor.shape[:1] == weight.shape[:1] if part == "B.weight" else tensor.numel() == len(weight)


def _in_peft(network: str, own: dict[str, Tensor], layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors for one network by PEFT's names, which are those of its layers. Raises ValueError."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    if network == "unet":
        return dict(convert_unet_state_dict_to_peft(own))
    named = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    if "text_model" in layers:
        return dict(named)
    return {name.removeprefix("text_model."): tensor for name, tensor in named.items()}
