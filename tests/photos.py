"""Small real pictures for tests, made where they are needed; equal seeds give equal pixels."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def photo(seed: int = 0, width: int = 64, height: int = 48) -> Image.Image:
    """A smooth RGB picture, so that JPEG and resizing change little; no two seeds look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    """The bytes of a picture file."""
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, width: int = 64, height: int = 48) -> bytes:
    """The bytes of a JPEG of `photo(seed)`."""
    return encoded(photo(seed, width, height), quality=95, subsampling="4:4:4")


def pixels_of(data: bytes | Path) -> np.ndarray[Any, np.dtype[np.int16]]:
    """(H, W, 3) signed, so that pictures can be subtracted. The picture must be RGB already."""
    with Image.open(data if isinstance(data, Path) else BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image).astype(np.int16)


def put(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files by name. -> `folder`."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
