"""Which weights of a CLIP are trained: all, one tower, low-rank additions, or a linear map on the token states."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from limner.config import TrainClipConfig
from limner.errors import ConfigError
from limner.models.adapter import FILE
from limner.models.clip import Clip
from limner.models.lora import require_peft

TOWERS = {"text": ("text_model", "text_projection"), "image": ("vision_model", "visual_projection")}
MATRICES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # of a layer, to which low-rank ones are added


class StateMap(nn.Module):
    """A linear map of token states: s becomes (I + D) s, where D begins as zero.

    Zarei et al. (2406.07844) map a frozen text encoder's output like this.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(width, width))

    @property
    def weight(self) -> Tensor:
        """I + D (D, D)."""
        return torch.eye(len(self.change), device=self.change.device) + self.change.detach()

    def forward(self, states: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        return states + states @ self.change.T


@dataclass(frozen=True)
class Adapted(Clip):
    """A CLIP whose token states are read through a linear map, as `StateMap` learned it and a U-Net will have it."""

    weight: Tensor  # (D, D)

    def token_states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `Clip.token_states`, mapped."""
        last, before = (states @ self.weight.to(states).T for states in super().token_states(ids))  # (N, L, D)
        return last, before


class Tuning:
    """Prepares a CLIP's network for training in place, and writes what came of it."""

    def __init__(self, clip: Clip, config: TrainClipConfig) -> None:
        """Raises ConfigError where the CLIP can't be tuned like this."""
        self.clip = clip
        self.adapter: StateMap | None = None
        self.lora: Any = None
        network = clip.network
        if config.tune == "adapter":
            if not clip.causal:
                raise ConfigError(
                    "tune=adapter is for a CLIP, whose token states a U-Net reads; name one, or tune fully."
                )
            network.requires_grad_(False)
            self.adapter = StateMap(network.config.text_config.hidden_size)
            # In front of the projection, which reads of each text the state of its end token
            network.text_projection = nn.Sequential(self.adapter, network.text_projection)
        if config.tune == "lora":
            self.lora = _with_lora(network, config)
        if config.lock is not None:
            for part in TOWERS[config.lock]:
                if hasattr(network, part):  # SigLIP has no projections
                    getattr(network, part).requires_grad_(False)
        network.logit_scale.requires_grad_(True)
        if not clip.causal:
            network.logit_bias.requires_grad_(config.loss == "sigmoid")
        self.rates = layer_rates(network, config.layer_decay)

    def save(self, folder: Path) -> None:
        """Write `folder/clip`, as plain Transformers reads it, and `folder/lora` or `folder/adapter` beside it."""
        clip = self.clip
        if self.lora is not None:
            # Its default asks the hub whether embeddings were changed
            self.lora.save_pretrained(folder / "lora", save_embedding_layers=False)
            (folder / "lora" / "README.md").unlink(missing_ok=True)  # a form to fill in
            clip = Clip(copy.deepcopy(self.lora).merge_and_unload(), clip.tokenizer, clip.normalisation)
        if self.adapter is not None:
            clip = Clip(copy.deepcopy(clip.network), clip.tokenizer, clip.normalisation)
            projection = clip.network.text_projection[1]
            projection.weight = nn.Parameter(projection.weight @ self.adapter.weight)  # (E, D)
            clip.network.text_projection = projection
            (folder / "adapter").mkdir()
            save_file({"weight": self.adapter.weight}, folder / "adapter" / FILE)
        clip.save(folder / "clip")


def _with_lora(network: Any, config: TrainClipConfig) -> Any:
    """Add low-rank matrices to those of the layers (Hu et al. 2106.09685), in place; all else is frozen."""
    towers = "|".join(parts[0] for name, parts in TOWERS.items() if name != config.lock)
    names = "|".join(MATRICES)
    matrices = rf".*({towers})\.encoder\..*\.({names})"  # SigLIP's head has some by these names too
    peft = require_peft()
    wanted = peft.LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=matrices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's calls of Transformers
        lora = peft.get_peft_model(network, wanted)
    lora.peft_config["default"].base_model_name_or_path = config.model  # not where the hub's cache has it
    return lora


def layer_rates(network: nn.Module, decay: float) -> dict[str, float]:
    """Shares of the learning rate by parameter's name: 1 behind the last layer, and `decay` less for each before it.

    Embeddings come before the first layer (Bao et al. 2106.08254, section 3.2; Clark et al. 2003.10555, section 3.2).
    """
    if decay == 1:
        return {}
    layers: dict[str, int] = {}  # of each tower
    for name, _ in network.named_parameters():
        if found := re.search(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.", name):
            layers[found[1]] = max(layers.get(found[1], 0), int(found[2]) + 1)
    rates = {}
    for name, _ in network.named_parameters():
        for tower, count in layers.items():
            if found := re.search(rf"{tower}\.encoder\.layers\.(\d+)\.", name):
                rates[name] = decay ** (count - int(found[1]))
            elif f"{tower}.embeddings" in name or f"{tower}.pre_layrnorm" in name:
                rates[name] = decay ** (count + 1)
    return rates
