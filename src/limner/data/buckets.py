"""Aspect-ratio buckets: a few sizes of about the same area, so that pictures needn't be cropped to squares.

Source: NovelAI's aspect ratio bucketing (https://github.com/NovelAI/novelai-aspect-ratio-bucketing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from limner.data.pictures import Size


def bucket_sizes(side: int, step: int) -> list[Size]:
    """Heights and widths that are multiples of `step`, from the widest to the highest.

    None has more pixels than the square of `side`, which is one of them where `step` divides it, and no side is below
    half of `side`, so none is more than four times as long as it is wide.
    """
    short = range(-(-side // (2 * step)) * step, side + 1, step)
    wide = [(height, side**2 // (height * step) * step) for height in short]
    return sorted({*wide, *((width, height) for height, width in wide)})


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` to whose shape the least of a picture of this height and width must be cut off.

    That keeps a share min(a/b, b/a) of the picture, where a and b are the ratios of width to height.
    """

    def distance(other: Size) -> float:
        return abs(math.log(size[1] * other[0] / (size[0] * other[1])))

    return min(sizes, key=distance)
