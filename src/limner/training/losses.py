"""Losses that are more than a mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def contrastive(text: Tensor, images: Tensor, scale: Tensor, owners: Tensor) -> Tensor:
    """Symmetric InfoNCE in which pairs of the same picture are never each other's negatives.

    text, images (N, E) features of unit length; scale, the inverse temperature; owners (N,), the picture that each
    pair belongs to. With distinct owners it is CLIP's loss (Radford et al. 2103.00020, figure 3); otherwise the
    positives of a row share its target evenly (Khosla et al. 2004.11362, equation 2) -> scalar.
    """
    logits = scale * text @ images.T  # (N, N)
    positive = (owners[:, None] == owners[None, :]).to(logits.dtype)
    target = positive / positive.sum(dim=1, keepdim=True)
    by_text = -(target * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()
    by_image = -(target * torch.log_softmax(logits.T, dim=1)).sum(dim=1).mean()
    return (by_text + by_image) / 2


def sigmoid(text: Tensor, images: Tensor, scale: Tensor, bias: Tensor, owners: Tensor) -> Tensor:
    """Each pair judged by itself: do these words belong to this picture? Zhai et al. (2303.15343), section 3.2.

    As `contrastive`, and `bias`, a scalar added to the scaled similarities -> scalar.
    """
    logits = scale * text @ images.T + bias  # (N, N)
    sign = torch.where(owners[:, None] == owners[None, :], 1.0, -1.0)
    return -logsigmoid(sign * logits).sum() / len(text)


def drift(states: Tensor, frozen: Tensor, mask: Tensor) -> Tensor:
    """How far token states have moved: squared distance over the squared length before, mean over a text's tokens.

    states, frozen (N, L, D); mask (N, L), true where a token counts -> (N,).
    """
    moved = (states - frozen).square().sum(dim=2) / frozen.square().sum(dim=2)  # (N, L)
    return (moved * mask).sum(dim=1) / mask.sum(dim=1)
