"""Pictures from disk to pixels, with the augmentation of training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from limner.artifacts import atomic_file
from limner.errors import DataError

Size = tuple[int, int]
"""Height and width."""
Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of a picture, in pixels, as Pillow counts them."""

ORIENTATION = 0x0112  # EXIF's number for it
_SIDES = re.compile(r"\b(left|right)(most|hand)?\b", re.IGNORECASE)


def may_flip(caption: str) -> bool:
    """Whether a mirrored picture still fits the caption: one that says left or right does not."""
    return _SIDES.search(caption) is None


def load_pixels(path: Path, size: int) -> Tensor:
    """The centre square of a picture, at `size` pixels a side. -> (3, size, size) in [-1, 1]. Raises DataError."""
    picture = read_picture(path)
    return to_pixels(picture, centre_box(picture, (size, size)), (size, size))


def load_crop(path: Path, size: int, rng: np.random.Generator, *, min_scale: float, flip: bool) -> Tensor:
    """A random square crop of at least `min_scale` of the largest one's area, mirrored half the time if `flip`.

    -> (3, size, size) in [-1, 1]. Raises DataError when the picture can't be read.
    """
    picture = read_picture(path)
    pixels = to_pixels(picture, random_box(picture, (size, size), rng, min_scale), (size, size))
    return pixels.flip(-1) if flip and rng.random() < 0.5 else pixels


def read_picture(path: Path) -> Image.Image:
    """A picture as people see it, in mode RGB, or RGBA where parts of it are see-through.

    Raises DataError when it can't be read.
    """
    with _named(path), Image.open(path) as image:
        seen = eight_bits(upright(image))
        return seen.convert("RGBA" if seen.has_transparency_data else "RGB")


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says; the same where that says nothing, or is damaged."""
    with suppress(Exception):
        if image.getexif().get(ORIENTATION, 1) in range(2, 9):
            return ImageOps.exif_transpose(image)
    return image


def eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 16 bits in grey in 8, which Pillow would clip; the same where it is another."""
    if not image.mode.startswith("I"):  # I;16, I;16B or I
        return image
    values = np.asarray(image).astype(np.int64)
    return Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))


def read_shape(path: Path) -> tuple[Size, bool]:
    """Height and width of a picture, and whether parts of it may be see-through, from its header. Raises DataError."""
    with _named(path), Image.open(path) as image:
        return (image.height, image.width), image.has_transparency_data


def centre_box(picture: Image.Image, size: Size) -> Box:
    """The largest part of a picture that has the shape of `size`, from its middle."""
    width, height = _largest(picture, size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return left, top, left + width, top + height


def random_box(picture: Image.Image, size: Size, rng: np.random.Generator, min_scale: float) -> Box:
    """A random part of the shape of `size`, with at least the share `min_scale` of the largest such part's area."""
    share = float(rng.uniform(min_scale, 1.0)) ** 0.5
    width, height = (max(1, round(side * share)) for side in _largest(picture, size))
    left = int(rng.integers(picture.width - width + 1))
    top = int(rng.integers(picture.height - height + 1))
    return left, top, left + width, top + height


def to_pixels(picture: Image.Image, box: Box, size: Size) -> Tensor:
    """A part of a picture at `size`, in its own colours also where it is see-through. -> (3, H, W) in [-1, 1]."""
    resized = picture.convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS, box=box)
    array = torch.from_numpy(np.array(resized))  # (H, W, 3) uint8
    return array.permute(2, 0, 1).float() / 127.5 - 1


def to_mask(picture: Image.Image, box: Box, size: Size) -> Tensor:
    """How opaque a part of a picture is, averaged over areas. -> (1, H, W): 0 is see-through, 1 opaque."""
    resized = picture.convert("RGBA").getchannel("A").resize(size[::-1], Image.Resampling.BOX, box=box)
    return torch.from_numpy(np.array(resized))[None].float() / 255  # of (H, W) uint8


def _largest(picture: Image.Image, size: Size) -> tuple[int, int]:
    """Width and height of the largest part of a picture that has the shape of `size`."""
    height, width = size
    if picture.width * height <= picture.height * width:
        return picture.width, max(1, round(picture.width * height / width))
    return max(1, round(picture.height * width / height)), picture.height


def jitter(pixels: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """Brightness, contrast and saturation changed by up to `strength`, a share, each.

    (3, H, W) in [-1, 1] -> the same.
    """
    brightness, contrast, saturation = 1 + strength * rng.uniform(-1, 1, 3)
    unit = (pixels * 0.5 + 0.5) * brightness
    unit = unit.mean() + contrast * (unit - unit.mean())
    grey = unit.mean(dim=0, keepdim=True)
    return ((grey + saturation * (unit - grey)).clamp(0, 1)) * 2 - 1


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow has it
        raise DataError(f"The picture {path} can't be read ({error}); run `limner prepare` again.") from None


def save_grid(pixels: Tensor, path: Path, columns: int) -> None:
    """Write pixels (N, 3, H, W) in [-1, 1] as one PNG, row by row."""
    count, _, height, width = pixels.shape
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    arrays = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for number, array in enumerate(arrays):  # (H, W, 3) uint8
        sheet.paste(Image.fromarray(array), (number % columns * width, number // columns * height))
    with atomic_file(path) as partial:
        sheet.save(partial, format="PNG")
