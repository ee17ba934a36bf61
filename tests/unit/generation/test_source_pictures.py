"""Pictures to begin with come from anywhere: what can't be used is said in a sentence, and costs little."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from limner.errors import DataError
from limner.generation import sources
from limner.generation.sources import mask_of, picture_of, read_mask, read_picture


def encoded(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    """The bytes of a file."""
    buffer = BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says that size, with hardly any pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
FRAMES = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "empty file"),
        (b"A dog.", "not a picture"),
        (SVG, "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (encoded(PHOTO)[:-200], "broken picture"),
        (encoded(PHOTO, "JPEG")[:300], "broken picture"),
        (png_of(100_000, 100_000), "too many pixels"),
        (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "several frames"),
        (encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "several frames"),
        (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "several frames"),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("of", [picture_of, mask_of])
def test_what_can_not_be_begun_with_is_refused(of: Callable[[bytes, str], object], data: bytes, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        of(data, "photo.png")
    assert "photo.png" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=200), st.integers(0, 2000), st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"]))
@settings(max_examples=200)
def test_damaged_files_are_read_or_refused(noise: bytes, at: int, kind: str) -> None:
    data = encoded(PHOTO, kind)
    at %= len(data)
    try:
        source = picture_of(data[:at] + noise + data[at + len(noise) :], "x")
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert source.image.mode == "RGB"


def test_pictures_stand_upright_in_rgb_on_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    turned = picture_of(encoded(PHOTO, "PNG", exif=exif), "x").image
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(PHOTO), -1))
    see_through = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert picture_of(encoded(see_through), "x").image.getpixel((0, 0)) == (255, 255, 255)
    grey = picture_of(encoded(Image.new("L", (4, 4), 7)), "x").image
    assert (grey.mode, grey.getpixel((0, 0))) == ("RGB", (7, 7, 7))


def test_masks_are_grey_and_opaque() -> None:
    assert mask_of(encoded(Image.new("RGBA", (4, 4), "white")), "x").image.getpixel((0, 0)) == 255
    assert mask_of(encoded(Image.new("1", (4, 4), 1)), "x").image.getpixel((0, 0)) == 255
    with pytest.raises(DataError, match="see-through"):
        mask_of(encoded(Image.new("RGBA", (4, 4), (255, 255, 255, 9))), "x")


def test_files_that_are_missing_or_large_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for read in (read_picture, read_mask):
        for name in ("none.png", ".", "x\0y", "n" * 300):
            with pytest.raises(DataError, match="can't be read"):
                read(tmp_path / name)
    monkeypatch.setattr(sources, "MOST_BYTES", 2**20)
    (tmp_path / "large.bin").write_bytes(bytes(2**20 + 1))
    with pytest.raises(DataError, match="more than 1 MiB"):
        read_picture(tmp_path / "large.bin")
