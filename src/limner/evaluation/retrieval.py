"""How well captions and pictures find each other in a common space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from limner.evaluation.intervals import Interval, mean_interval

KS = (1, 5, 10)


@dataclass(frozen=True)
class Ranks:
    """How many wrong answers lie before the right one, for each of M captions and N pictures."""

    text: Tensor
    """(M,): pictures that are as near to a caption as its own, or nearer."""
    images: Tensor
    """(N,): captions of others that are as near to a picture as the nearest of its own, or nearer."""
    owners: Tensor
    """(M,): the picture that each caption belongs to."""

    @property
    def captioned(self) -> Tensor:
        """Numbers of the pictures that have a caption; the others can't find one -> (C,)."""
        return self.owners.unique()


def ranks(text: Tensor, images: Tensor, owners: Tensor, block: int = 4096) -> Ranks:
    """Rank all pictures for each caption and all captions for each picture. Ties count against; NaN finds nothing.

    text (M, E) and images (N, E) features of unit length; owners (M,), the picture that each caption belongs to.
    At most `block` captions by `block` pictures are compared at once.
    """
    own = torch.cat(
        [_similarity(t[:, None], images[o, :, None]) for t, o in zip(text.split(block), owners.split(block))]
    )
    own = own[:, 0, 0]  # (M,)
    best = torch.full((len(images),), -torch.inf).scatter_reduce(0, owners, own, "amax")  # (N,)
    text_ranks, image_ranks = torch.zeros_like(owners), torch.zeros(len(images), dtype=torch.long)
    for rows in torch.arange(len(text)).split(block):
        for columns in torch.arange(len(images)).split(block):
            similarity = _similarity(text[rows], images[columns].T)  # (block, block)
            wrong = owners[rows, None] != columns
            text_ranks[rows] += ((similarity >= own[rows, None]) & wrong).sum(dim=1)
            image_ranks[columns] += ((similarity >= best[columns]) & wrong).sum(dim=0)
    return Ranks(text_ranks, image_ranks, owners)


def caption_ranks(text: Tensor, images: Tensor, own: Tensor, block: int = 4096) -> Tensor:
    """How many other captions are as near to each picture as its own, or nearer; those of the same words are one.

    text (K, E) and images (N, E), features of unit length; own (N,), each picture's of the K. -> (N,). Ties count
    against; NaN finds nothing.
    """
    found = []
    for rows, mine in zip(images.split(block), own.split(block)):
        near = _similarity(rows[:, None], text[mine, :, None])[:, 0]  # (block, 1)
        counts = [(_similarity(rows, part.T) >= near).sum(dim=1) for part in text.split(block)]
        found.append(torch.stack(counts).sum(dim=0) - 1)  # its own is as near as itself
    return torch.cat(found)


def _similarity(text: Tensor, images: Tensor) -> Tensor:
    """The matrix product, the same to the last bit in blocks of any size, so that equal features always tie."""
    # float32 sums differ with the shape of the matrices; float64 sums don't once they are rounded to float32
    return (text.double() @ images.double()).float().nan_to_num(nan=-torch.inf)


def recall(ranks: Ranks) -> dict[str, float]:
    """Recall@k both ways for each of `KS`, as CLIP_benchmark defines it, and the median rank.

    text_to_image_r@k: share of captions whose picture is among their k nearest; image_to_text_r@k: share of pictures
    of which any caption is among their k nearest; `..._median_rank` counts from 1. Pictures without a caption don't
    count.
    """
    ways = {"text_to_image": ranks.text, "image_to_text": ranks.images[ranks.captioned]}
    return {
        **{f"{way}_r@{k}": (rank < k).double().mean().item() for way, rank in ways.items() for k in KS},
        **{f"{way}_median_rank": float(np.median(rank.numpy())) + 1 for way, rank in ways.items()},
    }


def intervals(ranks: Ranks) -> dict[str, Interval]:
    """The recalls that `recall` names, by its names, with their intervals.

    Only queries are drawn, pictures with all their captions: what they are compared with stays as it is.
    """
    ways = {
        "text_to_image": (ranks.text, ranks.owners),
        "image_to_text": (ranks.images[ranks.captioned], ranks.captioned),
    }
    return {
        f"{way}_r@{k}": mean_interval((rank < k).double(), owners) for way, (rank, owners) in ways.items() for k in KS
    }


def mean_recall(found: Ranks) -> dict[str, float]:
    """Mean of the six recalls, "value", and its "standard_error", as if other pictures had been drawn.

    A picture comes with all its captions, whose number varies, so that recall of captions is a ratio of two sums; the
    error is that of its linear part (infinitesimal jackknife; Efron, The Jackknife, the Bootstrap and Other Resampling
    Plans, 1982, chapter 6), to which resampling the pictures comes close.
    """
    captioned, picture = found.owners.unique(return_inverse=True)  # (C,), (M,)
    limits, count = torch.tensor(KS), len(captioned)
    text = (found.text[:, None] < limits).double().mean(dim=1)  # (M,)
    images = (found.images[captioned, None] < limits).double().mean(dim=1)  # (C,)
    above = torch.zeros(count, dtype=torch.double).index_add(0, picture, text - text.mean())  # (C,)
    pull = (above * count / len(text) + images - images.mean()) / 2  # (C,)
    return {
        "value": ((text.mean() + images.mean()) / 2).item(),
        "standard_error": (pull.norm() / count).item(),
    }
