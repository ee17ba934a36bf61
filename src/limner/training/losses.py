"""Losses that are more than a mean."""

from __future__ import annotations

import torch
from torch import Tensor


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
