"""A network that tells photographs from reconstructions patch by patch, and what it teaches a VAE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu, softplus

NORM_GROUPS = 8


class Critic(nn.Module):
    """A patch discriminator (Isola et al. 1611.07004, section 3.2.2), with group norms and kernels of 3."""

    def __init__(self, channels: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for count in channels:
            layers += [nn.Conv2d(width, count, 3, stride=2, padding=1), nn.GroupNorm(NORM_GROUPS, count)]
            layers += [nn.LeakyReLU(0.2)]
            width = count
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        """How real each patch of 8 pixels and its surroundings looks. (N, 3, H, W) -> (N, 1, H / 8, W / 8)."""
        return self.layers(pixels)


def contest(critic: nn.Module, real: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """What a critic is to learn of pictures real and drawn (N, 3, H, W), and what the drawn ones are to gain on it.

    -> its hinge loss (Lim and Ye 1705.02894, equation 3), which moves the critic alone, and the non-saturating loss of
    what drew (Goodfellow et al. 1406.2661, section 3), which moves that alone: one optimiser may follow their sum.
    """
    learned = relu(1 - critic(real)).mean() + relu(1 + critic(drawn.detach())).mean()
    still = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    return learned, softplus(-functional_call(critic, still, (drawn,))).mean()


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Each of a batch (N, C, S, S) turned by so many quarters `turns` (N,) -> (N, C, S, S)."""
    if not turns.any():
        return x
    return torch.stack([torch.rot90(one, count, dims=(1, 2)) for one, count in zip(x, turns.tolist())])
