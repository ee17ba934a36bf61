"""Mixes of a CLIP and its tuned child, from one to the other, and which to keep.

WiSE-FT, Wortsman et al. (2109.01903): between the weights of both lie networks that know nearly all that the child
learned and have forgotten less.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from limner.errors import ModelError
from limner.models.clip import Clip

ALPHAS = tuple(tenths / 10 for tenths in range(11))
"""The shares of the tuned weights that a sweep goes through: 0, 0.1, ... 1."""


@torch.no_grad()
def mixed(base: Clip, tuned: Clip, alpha: float) -> Clip:
    """The CLIP whose weights are (1 - alpha) base + alpha tuned; Wortsman et al. (2109.01903), section 3.

    alpha is from 0 to 1, and both ends are exact. What is no floating-point number is the tuned one's, as are device
    and type. Raises ModelError where the two have other weights or other vocabularies.
    """
    assert 0 <= alpha <= 1
    _check_fit(base, tuned)
    old, new = base.network.state_dict(), tuned.network.state_dict()
    network = copy.deepcopy(tuned.network).eval()
    for name, value in network.state_dict().items():
        if alpha < 1 and value.is_floating_point():
            begin = old[name].to(value)
            # At 0 not even lerp is exact to the bit: it makes 0 of -0
            value.copy_(torch.lerp(begin, new[name], alpha) if alpha else begin)
    return Clip(network, tuned.tokenizer, tuned.normalisation)


def _check_fit(base: Clip, tuned: Clip) -> None:
    advice = "so they can't be mixed; name the model that the tuning began with."
    if base.tokenizer.get_vocab() != tuned.tokenizer.get_vocab():
        raise ModelError(f"The base CLIP and the tuned one have other vocabularies, {advice}")
    old, new = (
        {name: tuple(value.shape) for name, value in clip.network.state_dict().items()} for clip in (base, tuned)
    )
    if other := sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
        raise ModelError(f"The base CLIP and the tuned one have weights of other shapes ({other[0]}), {advice}")


def choose(rows: Sequence[Mapping[str, Any]], min_cosine: float) -> float:
    """The alpha of the mix to keep, of `rows` as `alignment.Judged.row` makes them, with "alpha"; one has alpha 0.

    Mixes whose token states, of the last layer and of the one before, have a mean cosine of `min_cosine` or more to
    those of the base may be chosen, and the base itself always. Of these, the one of best mean recall sets the mark;
    kept is the one of smallest alpha whose mean recall is at most one standard error below it (the one-standard-error
    rule: Breiman et al., Classification and Regression Trees, 1984, section 3.4.3; Hastie et al., The Elements of
    Statistical Learning, section 7.10), the error being that of the best. So a step away from the base is taken only
    where recall shows it.
    """
    allowed = [row for row in rows if row["alpha"] == 0 or _keeps(row, min_cosine)]
    best = max(allowed, key=lambda row: (row["mean_recall"]["value"], -row["alpha"]))["mean_recall"]
    mark = best["value"] - best["standard_error"]
    return float(min(row["alpha"] for row in allowed if row["mean_recall"]["value"] >= mark))


def _keeps(row: Mapping[str, Any], min_cosine: float) -> bool:
    return all(cosine is not None and cosine >= min_cosine for cosine in row["drift"].values())
