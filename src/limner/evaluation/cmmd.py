"""How drawn pictures compare with photographs and with their captions, by the features of a CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from limner.evaluation.features import caption_features
from limner.evaluation.retrieval import ranks
from limner.models.clip import Clip

SIGMA, SCALE = 10.0, 1000.0
"""Width of the kernel, and what the distance is multiplied with to be read well; as the authors have them."""
BLOCK = 1024  # rows of a kernel matrix at once


def cmmd(one: Tensor, other: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets of features of unit length, (N, E) and (M, E), times 1000.

    Jayasumana et al. (2401.09603), section 4, with a Gaussian kernel of sigma 10. Their equation 4 leaves out the pairs
    of a picture with itself; their reference implementation, whose figures others report, keeps them (Gretton et al.
    2012, equation 5), and so does this. So it is 0 for equal sets, never below 0 but for rounding, and above 0
    for two small samples of the same pictures: compare only figures from equally many.
    """
    one, other = one.double(), other.double()  # the kernel is all but constant here, and float32 has no digits left
    return SCALE * (_mean_kernel(one, one) + _mean_kernel(other, other) - 2 * _mean_kernel(one, other))


def _mean_kernel(one: Tensor, other: Tensor) -> float:
    """Mean of exp(-d^2 / (2 sigma^2)) over all pairs of rows, (N, E) and (M, E)."""
    total = 0.0
    for rows in one.split(BLOCK):
        distances = rows.square().sum(dim=1)[:, None] + other.square().sum(dim=1) - 2 * rows @ other.T  # (BLOCK, M)
        total += torch.exp(distances / (-2 * SIGMA**2)).sum().item()
    return total / (len(one) * len(other))


def clip_score(text: Tensor, images: Tensor) -> float:
    """Mean of 2.5 max(cos, 0) over captions and their pictures; Hessel et al. (2104.08718), section 3.

    text (N, E) and images (N, E), features of unit length; caption i belongs to picture i.
    """
    return 2.5 * (text * images).sum(dim=1).clamp(min=0).double().mean().item()


def r_precision(images: Tensor, text: Tensor, own: Tensor) -> float:
    """Share of pictures that are nearer to their own caption than to all others; Xu et al. (1711.10485), section 4.

    images (N, E) and text (K, E), features of unit length; own (N,), each picture's caption of the K. Xu et al. take
    99 others for each picture. Ties count against.
    """
    return (ranks(images, text, own).text == 0).double().mean().item()


@torch.no_grad()
def score_pictures(
    judge: Clip, pixels: Tensor, captions: Sequence[str], real_features: Tensor, batch_size: int = 32
) -> dict[str, float]:
    """Figures of pictures that were drawn for captions: cmmd, clip_score and r_precision.

    pixels (N, 3, H, W) in [-1, 1], N captions; real_features (M, E), the judge's of photographs. Where the judge is
    the base of a mix, it is not independent of what it judges: a mix near it may please it for that alone. Such
    figures rank the mixes of one pair and say nothing beside; an independent judge comes with `limner evaluate`.
    """
    size = (judge.size, judge.size)
    batches = (interpolate(batch.float(), size, mode="bicubic", antialias=True) for batch in pixels.split(batch_size))
    features = [judge.image_features(batch.clamp(-1, 1).to(judge.network.device)).cpu() for batch in batches]
    images = torch.cat(features)  # (N, E)
    texts = list(dict.fromkeys(captions))  # captions of the same words are one
    text = caption_features(judge, texts, batch_size)  # (K, E)
    own = torch.tensor([texts.index(caption) for caption in captions])  # (N,)
    return {
        "cmmd": cmmd(images, real_features),
        "clip_score": clip_score(text[own], images),
        "r_precision": r_precision(images, text, own),
    }
