"""Losses that are more than a mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def contrastive(text: Tensor, images: Tensor, scale: Tensor, owners: Tensor) -> Tensor:
    """Symmetric InfoNCE in which pairs of the same picture are never each other's negatives.

    text, images (N, E) features of unit length; scale, the inverse temperature; owners (N,), the picture that each
    pair belongs to. With distinct owners it is CLIP's loss (Radford et al. 2103.00020, figure 3); otherwise the
    positives of a row share its target evenly (Khosla et al. 2004.11362, equation 2) -> scalar, 0 without a pair.
    """
    logits = scale * text @ images.T  # (N, N)
    positive = (owners[:, None] == owners[None, :]).to(logits.dtype)
    target = positive / positive.sum(dim=1, keepdim=True)
    by_text, by_image = (-(target * torch.log_softmax(rows, dim=1)).sum() for rows in (logits, logits.T))
    return (by_text + by_image) / (2 * max(len(text), 1))


def sigmoid(text: Tensor, images: Tensor, scale: Tensor, bias: Tensor, owners: Tensor) -> Tensor:
    """Each pair judged by itself: do these words belong to this picture? Zhai et al. (2303.15343), section 3.2.

    As `contrastive`, and `bias`, a scalar added to the scaled similarities -> scalar.
    """
    logits = scale * text @ images.T + bias  # (N, N)
    sign = torch.where(owners[:, None] == owners[None, :], 1.0, -1.0)
    return -logsigmoid(sign * logits).sum() / max(len(text), 1)


def missed(text: Tensor, images: Tensor, read: Tensor, seen: Tensor) -> Tensor:
    """Share of a teacher's similarities of captions and pictures, each to each, that a student's miss.

    text, images (N, E), the student's features of unit length, and read, seen (N, T), the teacher's of the same
    captions and pictures, which may be of another width -> scalar, 0 where all similarities agree and 1 where the
    student's are no better than their mean. Tung and Mori (1907.09682), equation 4, over both kinds at once; TinyCLIP
    (Wu et al. 2309.12314, section 3.1) compares those of captions to pictures alone.
    """
    ours, wanted = torch.cat([text, images]), torch.cat([read, seen])
    similar = wanted @ wanted.T  # (2N, 2N)
    return (ours @ ours.T - similar).square().mean() / similar.var(correction=0)


def drift(states: Tensor, frozen: Tensor, mask: Tensor) -> Tensor:
    """How far token states have moved: squared distance over the squared length before, mean over a text's tokens.

    states, frozen (N, L, D); mask (N, L), true where a token counts -> (N,).
    """
    moved = (states - frozen).square().sum(dim=2) / frozen.square().sum(dim=2)  # (N, L)
    return (moved * mask).sum(dim=1) / mask.sum(dim=1)
