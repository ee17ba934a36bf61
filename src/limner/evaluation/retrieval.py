"""Recall@k of captions and pictures in a common space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def recall(text: Tensor, images: Tensor, owners: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall@k both ways, as CLIP_benchmark defines it.

    text (M, E) and images (N, E) features of unit length; owners (M,), the picture that each caption belongs to.
    text_to_image_r@k: share of captions whose picture is among their k nearest; image_to_text_r@k: share of pictures
    of which any caption is among their k nearest. Ties count against.
    """
    similarity = (text @ images.T).nan_to_num(nan=-torch.inf)  # (M, N)
    own = similarity.gather(1, owners[:, None])  # (M, 1)
    text_rank = (similarity >= own).sum(dim=1) - 1  # (M,): how many pictures are as near or nearer
    best = torch.full((len(images),), -torch.inf).scatter_reduce(0, owners, own[:, 0], "amax")  # (N,)
    foreign = torch.ones_like(similarity, dtype=torch.bool).scatter(1, owners[:, None], value=False)
    image_rank = ((similarity >= best) & foreign).sum(dim=0)  # (N,)
    return {
        **{f"text_to_image_r@{k}": (text_rank < k).double().mean().item() for k in ks},
        **{f"image_to_text_r@{k}": (image_rank < k).double().mean().item() for k in ks},
    }
