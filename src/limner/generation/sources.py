"""Pictures that a drawing begins with, and masks: files from anywhere, so bounded before they are decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from limner.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES, MOST_PIXELS = 64 * 2**20, 100_000_000


@dataclass(frozen=True)
class Source:
    """A picture from a file, decoded; equal to another of the same bytes."""

    ref: str
    """What the user calls it."""
    sha256: str
    """Of the file."""
    image: Image = field(compare=False, repr=False)


def read_picture(file: Path) -> Source:
    """The picture to begin with, upright, in RGB, and on white where it is see-through. Raises DataError."""
    return picture_of(_bytes(file), str(file))


def read_mask(file: Path) -> Source:
    """What of a picture is redrawn: white is, black is not, grey is mixed; in mode L. Raises DataError."""
    return mask_of(_bytes(file), str(file))


def picture_of(data: bytes, ref: str, most_pixels: int = MOST_PIXELS) -> Source:
    """As `read_picture`, of the bytes of a file that is called `ref`. Raises DataError."""
    return Source(ref, sha256(data).hexdigest(), _decoded(data, ref, most_pixels, keep_alpha=False))


def mask_of(data: bytes, ref: str, most_pixels: int = MOST_PIXELS) -> Source:
    """As `read_mask`, of the bytes of a file that is called `ref`. Raises DataError."""
    image = _decoded(data, ref, most_pixels, keep_alpha=True)
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        raise DataError(f"The mask {ref} is see-through; save it without an alpha channel, white where to redraw.")
    return Source(ref, sha256(data).hexdigest(), image.convert("L"))


def _bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"The picture {file} can't be read ({reason}); name another file.") from None
    if len(data) > MOST_BYTES:
        raise DataError(f"The picture {file} has more than {MOST_BYTES >> 20} MiB; save it smaller.")
    return data


def _decoded(data: bytes, ref: str, most_pixels: int, *, keep_alpha: bool) -> Image:
    from limner.data.checks import FIRST_FRAME, Limits, decode
    from limner.data.findings import Rejected

    try:
        image, kind, changes = decode(data, Limits(min_side=1, max_pixels=most_pixels, keep_alpha=keep_alpha))
    except Rejected as error:
        detail = f" ({error.detail})" if error.detail else ""
        raise DataError(
            f"{ref} can't be begun with: {error.reason}{detail}; save it as PNG, JPEG or WebP of at most "
            f"{most_pixels / 10**6:g} million pixels."
        ) from None
    if FIRST_FRAME in changes and kind != "MPO":  # phones put small pictures behind the real one
        raise DataError(f"{ref} has several frames; save the one that you mean as PNG.")
    return image
