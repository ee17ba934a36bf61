"""How far the token states of a tuned CLIP, which a U-Net reads, are from those before, position by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from limner.errors import ModelError
from limner.evaluation.features import caption_states
from limner.models.clip import Clip

SAME = 1e-4
"""States whose differences are a smaller share of their length than this differ only by rounding."""


def cosine(base: Tensor, tuned: Tensor, mask: Tensor) -> Tensor:
    """Mean cosine of states (N, L, D) of the same tokens, over the captions that reach a position.

    mask (N, L) is true where a caption has a token -> (L,); NaN where none has.
    """
    similarity = cosine_similarity(base, tuned, dim=2).double()  # (N, L)
    return similarity.where(mask, 0).sum(dim=0) / mask.sum(dim=0)


def cka(base: Tensor, tuned: Tensor, mask: Tensor) -> Tensor:
    """Linear CKA of states (N, L, D), over the captions that reach a position, which mask (N, L) tells -> (L,).

    1 where one is the other but for rotation, scale and shift (Kornblith et al. 1905.00414, section 3 and equation 4).
    With fewer captions than D it lies too high. NaN below 2 captions, and where their states are all the same, as at
    the begin token of a causal tower.
    """
    reached = list(enumerate(mask.T))
    return torch.stack([_linear_cka(base[rows, place], tuned[rows, place]) for place, rows in reached])


def _linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of representations (N, D) of the same N examples, or NaN."""
    x, y = x.double(), y.double()
    centred_x, centred_y = x - x.mean(dim=0), y - y.mean(dim=0)
    if not (centred_x.norm() > SAME * x.norm() and centred_y.norm() > SAME * y.norm()):
        return torch.tensor(torch.nan, dtype=torch.double)
    cross, own_x, own_y = centred_y.T @ centred_x, centred_x.T @ centred_x, centred_y.T @ centred_y  # (D, D)
    return cross.square().sum() / (own_x.norm() * own_y.norm())


def drift(base: Clip, tuned: Clip, captions: Sequence[str], batch_size: int) -> dict[str, dict[str, Any]]:
    """`cosine` and `cka` of both layers that a U-Net may read, "last" and "penultimate", ready for JSON.

    Of each layer: "cosine" and "cka" by position, "mean_cosine" over all tokens, "mean_cka" over the positions that
    have one, weighted by the captions that reach them; None for NaN. Padding does not count, though a U-Net sees it.
    Holds four arrays of captions x longest caption x D in memory. Raises ModelError where the two read captions as
    different tokens or have states of different width.
    """
    widths = {clip.network.config.text_config.hidden_size for clip in (base, tuned)}
    if len(widths) > 1 or not torch.equal(base.tokenize(captions), tuned.tokenize(captions)):
        raise ModelError(
            "Token states can't be compared between CLIPs whose tokenizers or text towers' widths differ; "
            "name the model that the tuning began with."
        )
    *before, mask = caption_states(base, captions, batch_size)
    *after, _ = caption_states(tuned, captions, batch_size)
    return {name: _figures(b, t, mask) for name, b, t in zip(("last", "penultimate"), before, after)}


def _figures(base: Tensor, tuned: Tensor, mask: Tensor) -> dict[str, Any]:
    by_cosine, by_cka, counts = cosine(base, tuned, mask), cka(base, tuned, mask), mask.sum(dim=0)  # (L,)
    has_cka = counts * by_cka.isfinite()  # (L,)
    return {
        "cosine": _json(by_cosine),
        "cka": _json(by_cka),
        "mean_cosine": _json((by_cosine * counts).sum() / counts.sum()),
        "mean_cka": _json((by_cka.nan_to_num() * has_cka).sum() / has_cka.sum()),
    }


def _json(values: Tensor) -> Any:
    """Numbers as Python has them, with None in place of NaN."""
    known = [value if math.isfinite(value) else None for value in values.reshape(-1).tolist()]
    return known if values.ndim else known[0]
