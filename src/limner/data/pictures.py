"""Pictures from disk to pixels, with the augmentation of training."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limner.artifacts import atomic_file
from limner.errors import DataError

_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def may_flip(caption: str) -> bool:
    """Whether a mirrored picture still fits the caption: one that says left or right does not."""
    return _SIDES.search(caption) is None


def load_pixels(path: Path, size: int) -> Tensor:
    """The centre square of a picture, at `size` pixels a side. -> (3, size, size) in [-1, 1]. Raises DataError."""
    image = _open(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return _to_pixels(image, (left, top, left + side, top + side), size)


def load_crop(path: Path, size: int, rng: np.random.Generator, *, min_scale: float, flip: bool) -> Tensor:
    """A random square crop of at least `min_scale` of the largest one's area, mirrored half the time if `flip`.

    -> (3, size, size) in [-1, 1]. Raises DataError when the picture can't be read.
    """
    image = _open(path)
    side = round(min(image.size) * float(rng.uniform(min_scale, 1.0)) ** 0.5)
    left = int(rng.integers(image.width - side + 1))
    top = int(rng.integers(image.height - side + 1))
    pixels = _to_pixels(image, (left, top, left + side, top + side), size)
    return pixels.flip(-1) if flip and rng.random() < 0.5 else pixels


def jitter(pixels: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """Brightness, contrast and saturation changed by up to `strength`, a share, each.

    (3, H, W) in [-1, 1] -> the same.
    """
    brightness, contrast, saturation = 1 + strength * rng.uniform(-1, 1, 3)
    unit = (pixels * 0.5 + 0.5) * brightness
    unit = unit.mean() + contrast * (unit - unit.mean())
    grey = unit.mean(dim=0, keepdim=True)
    return ((grey + saturation * (unit - grey)).clamp(0, 1)) * 2 - 1


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow has it
        raise DataError(f"The picture {path} can't be read ({error}); run `limner prepare` again.") from None


def _to_pixels(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Tensor:
    resized = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    array = torch.from_numpy(np.array(resized))  # (size, size, 3) uint8
    return array.permute(2, 0, 1).float() / 127.5 - 1


def save_grid(pixels: Tensor, path: Path, columns: int) -> None:
    """Write pixels (N, 3, H, W) in [-1, 1] as one PNG, row by row."""
    count, _, height, width = pixels.shape
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    arrays = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for number, array in enumerate(arrays):  # (H, W, 3) uint8
        sheet.paste(Image.fromarray(array), (number % columns * width, number // columns * height))
    with atomic_file(path) as partial:
        sheet.save(partial, format="PNG")
