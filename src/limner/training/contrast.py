"""Both towers of a CLIP in one pass, over chunks that fit in memory and processes that share a batch."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from limner.models.clip import Clip, token_states
from limner.training.losses import drift

LEAST_SCALE, MOST_SCALE = 1.0, 100.0  # inverse temperature (Radford et al. 2103.00020, section 2.5)
FIRST_BIAS = -10.0  # of the sigmoid loss, where the CLIP has none (Zhai et al. 2303.15343, section 3.2)


class Towers(nn.Module):
    """Features of captions and pictures, and how far the token states have moved from where they began."""

    def __init__(
        self, clip: Clip, *, chunk_size: int | None, biased: bool, guarded: bool, patch_dropout: float = 0.0
    ) -> None:
        """`biased`: learn a bias for the sigmoid loss; `guarded`: keep a copy of the text tower, to measure drift by.

        A bias that a CLIP does not have is no part of the result; another training begins anew with it.
        """
        super().__init__()
        self.clip = clip
        self.network = clip.network
        self.chunk_size = chunk_size
        self.patch_dropout = patch_dropout
        given = getattr(clip.network, "logit_bias", None)
        self.bias = nn.Parameter(torch.tensor(FIRST_BIAS), requires_grad=biased) if given is None else given
        # A SigLIP may come with more than CLIP's 100
        self.most = max(math.log(MOST_SCALE), clip.network.logit_scale.item())
        # In a list, since it is no part of what is trained or stored
        self.frozen: list[Any] = []
        if guarded:
            self.frozen = [copy.deepcopy(clip.network.text_model).requires_grad_(False).eval()]

    def forward(self, ids: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """ids (N, L), pixels (N, 3, S, S) -> features (N, E) twice, drift (N,), inverse temperature, bias.

        With `chunk_size` activations are kept for one chunk at a time: each chunk is encoded once for its features and
        once more when their gradients are there, which is gradient caching (Gao et al. 2101.06983) and exact.
        """
        size = self.chunk_size or len(ids)
        chunks = list(zip(ids.split(size), pixels.split(size)))
        if len(chunks) == 1:
            parts = [self._encode(*chunks[0])]
        else:
            parts = [checkpoint(self._encode, *chunk, use_reentrant=False) for chunk in chunks]
        text, images, moved = (torch.cat(values) for values in zip(*parts))
        return text, images, moved, self.network.logit_scale.exp(), self.bias

    def _encode(self, ids: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        text, images = self.clip.text_features(ids), self.clip.image_features(pixels, self.patch_dropout)
        if not self.frozen:
            return text, images, text.new_zeros(len(text))
        ids = self.clip.trimmed(ids)
        frozen = self.frozen[0].to(ids.device)
        with torch.no_grad():
            wanted = token_states(frozen, ids)
        mask = self.clip.mask(ids)
        moved = [drift(now, then, mask) for now, then in zip(token_states(self.network.text_model, ids), wanted)]
        return text, images, torch.stack(moved).mean(dim=0)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the temperature where it can be learned."""
        self.network.logit_scale.clamp_(math.log(LEAST_SCALE), self.most)


class _Gather(torch.autograd.Function):
    """Rows of all processes, with gradients: each row's is the sum of those that the processes have for it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.count :][: ctx.count]


def gathered(rows: Tensor) -> Tensor:
    """The rows (n, ...) of every process, one after the other -> (n x processes, ...), with gradients.

    Every process then computes the loss of the whole batch. The gradients that arrive here are summed over processes
    and averaged again with those of the weights, so that the result is one process's at the same batch.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    joined: Tensor = _Gather.apply(rows)
    return joined
