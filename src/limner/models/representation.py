"""A U-Net whose middle block is asked what an image encoder sees in the picture behind the noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

HIDDEN = 512  # width of the map between the two


class Aligned(nn.Module):
    """A U-Net, and a small map from its middle block to the features of an image encoder.

    Representation alignment (Yu et al. 2410.06940) at the middle block, which is brought to the places of the features
    as for U-Nets in Tian et al. 2503.18414. The map is no part of what is saved.
    """

    def __init__(self, unet: Any, width: int, side: int) -> None:
        """`width` and `side` are those of the features, (N, width, side, side)."""
        super().__init__()
        self.unet = unet
        self.side = side
        channels = unet.config["block_out_channels"][-1]
        self.map = nn.Sequential(nn.Conv2d(channels, HIDDEN, 1), nn.SiLU(), nn.Conv2d(HIDDEN, width, 1))

    def forward(self, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """As the U-Net's. -> its answer, and what the middle block makes of the features (N, width, side, side)."""
        seen: list[Tensor] = []
        hook = self.unet.mid_block.register_forward_hook(lambda *called: seen.append(called[2]))
        try:
            answer: Tensor = self.unet(*inputs, **named)[0]
        finally:
            hook.remove()
        middle = interpolate(seen[0], (self.side, self.side), mode="bilinear")  # (N, channels, side, side)
        return answer, self.map(middle)


def misaligned(mapped: Tensor, features: Tensor) -> Tensor:
    """One minus the mean cosine over places (Yu et al., equation 8, without its sign). (N, W, s, s) twice -> (N,)."""
    return 1 - cosine_similarity(mapped.float(), features, dim=1).mean(dim=(1, 2))
