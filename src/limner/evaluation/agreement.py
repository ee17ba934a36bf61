"""How well drawn pictures agree with their captions, by the features of a judge.

A figure is the mean of what is told here of each picture, so that intervals, paired tests and the best and worst
pictures come from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CANDIDATES = 100  # captions that a picture's own is among


def clip_score(text: Tensor, images: Tensor) -> Tensor:
    """2.5 max(cos, 0) of each caption and its picture; Hessel et al. (2104.08718), section 3. Twice (N, E) -> (N,)."""
    return 2.5 * (text * images).sum(dim=1).clamp(min=0).double()


def r_precision(images: Tensor, text: Tensor, own: Tensor, candidates: int = CANDIDATES, seed: int = 0) -> Tensor:
    """Whether each picture is nearer to its own caption than to 99 others; Xu et al. (1711.10485), section 4.

    images (N, E) and text (K, E), features of unit length of different captions; own (N,), each picture's of the K.
    The others are drawn by the seed and the picture's number alone; where there are fewer, all are. -> (N,): 1 or 0,
    and where t others are exactly as near, 1 / (t + 1), as a draw among them would have it. A NaN finds nothing.
    """
    others = min(candidates, len(text)) - 1
    hits = torch.zeros(len(images), dtype=torch.double)
    for number, mine in enumerate(own.tolist()):
        drawn = np.random.default_rng([seed, number]).choice(len(text) - 1, others, replace=False)  # (others,)
        rivals = torch.from_numpy(drawn + (drawn >= mine))
        # float32 of float64 sums, which is the same in matrices of any shape, so that equal features tie
        near = (text[[mine, *rivals.tolist()]].double() @ images[number].double()).float()  # (1 + others,)
        if (near[1:] <= near[0]).all():
            hits[number] = 1 / (near == near[0]).sum()
    return hits


def each_once(captions: Sequence[str]) -> tuple[list[str], list[int]]:
    """Captions of the same words are one, which is read once, so that they tie to the last bit -> K texts, the shortest
    first for less padding, and the number of each caption's."""
    texts = sorted(set(captions), key=lambda text: (len(text), text))
    place = {text: number for number, text in enumerate(texts)}
    return texts, [place[caption] for caption in captions]


def distinct(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """Captions of the same words are one -> K texts, and the number of each caption's (N,)."""
    texts = list(dict.fromkeys(captions))
    place = {text: number for number, text in enumerate(texts)}
    return texts, torch.tensor([place[caption] for caption in captions], dtype=torch.long)
