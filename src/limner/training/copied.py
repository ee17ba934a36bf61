"""Whether a U-Net draws what it was shown: told by latents, so that neither the dataset nor the VAE is needed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from limner.data.latents import LatentCache
from limner.evaluation.copies import copies, nearest, thumbnails
from limner.models import vae as vaes
from limner.training.encoded import Encoded

SIDE = 8  # of the latents that are compared, of whatever shape they were


class Shown:
    """All views of all train pictures, and how near val pictures, which nobody copied, come to them."""

    def __init__(self, encoded: Encoded) -> None:
        self.encoded = encoded
        self.training = self._small(encoded.train, range(encoded.train.views))  # (N V, C SIDE^2)
        self.real = nearest([self._small(encoded.val, range(1))], self.training)

    def share_of(self, latents: Tensor) -> float:
        """Share of drawn latents (N, C, h, w) that are copies, as `evaluation.copies` has it."""
        return copies(nearest([thumbnails(latents.cpu(), SIDE)], self.training), self.real).share

    def _small(self, cache: LatentCache, views: Iterable[int]) -> Tensor:
        rows = []
        for index in range(len(cache)):
            moments = torch.stack([cache.view(index, view) for view in views])  # (V, 2C, h, w)
            latents = vaes.to_latents(self.encoded.vae_config, moments.chunk(2, dim=1)[0])
            rows.append(thumbnails(latents, SIDE))
        return torch.cat(rows)
