"""Any file is either brought to upright 8-bit RGB or rejected with a reason."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from limner.data.checks import Limits, examine
from limner.data.findings import Rejected
from photos import encoded, jpeg, photo, pixels_of

UPRIGHT = np.asarray(photo(1)).astype(np.int16)  # (48, 64, 3)
PNG = encoded(photo(1), "PNG")


def reason(data: bytes, limits: Limits | None = None) -> str:
    """Why a file is rejected."""
    with pytest.raises(Rejected) as caught:
        examine(data, "x.jpg", limits or Limits())
    return caught.value.reason


@pytest.mark.parametrize(("file_format", "suffix"), [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp")])
def test_an_rgb_picture_keeps_its_bytes(file_format: str, suffix: str) -> None:
    data = encoded(photo(1), file_format)
    checked = examine(data, f"x{suffix}", Limits())
    assert (checked.data, checked.suffix, checked.changes) == (data, suffix, ())
    assert (checked.width, checked.height) == (64, 48)


@pytest.mark.parametrize(
    ("name", "data", "suffix"),
    [
        ("x.jpeg", jpeg(), ".jpeg"),
        ("x.JPG", jpeg(), ".jpg"),
        ("x.jpg", PNG, ".png"),
        ("x.png", jpeg(), ".jpg"),
        ("x", PNG, ".png"),
        ("x.txt", jpeg(), ".jpg"),
        ("x.gif", encoded(photo(1).quantize(), "GIF"), ".jpg"),
    ],
)
def test_the_content_decides_the_suffix(name: str, data: bytes, suffix: str) -> None:
    assert examine(data, name, Limits()).suffix == suffix


def test_a_rename_is_said() -> None:
    assert examine(PNG, "x.jpg", Limits()).changes == ("named .png instead of .jpg",)
    assert examine(PNG, "x", Limits()).changes == ("named .png instead of nothing",)


@pytest.mark.parametrize("file_format", ["BMP", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF"])
def test_other_formats_become_jpeg(file_format: str) -> None:
    codec = {"JPEG2000": "jpg_2000", "AVIF": "avif"}.get(file_format)
    if codec and not features.check(codec):
        pytest.skip(f"this Pillow has no {codec}")
    checked = examine(encoded(photo(1), file_format), "x", Limits())
    assert checked.suffix == ".jpg"
    assert checked.changes
    assert np.abs(pixels_of(checked.data) - UPRIGHT).mean() < 12  # GIF has 256 colours


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_every_exif_orientation_ends_upright(orientation: int, file_format: str) -> None:
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = photo(1) if undo is None else photo(1).transpose(undo)
    checked = examine(encoded(lying, file_format, quality=95, exif=exif), "x", Limits())
    assert np.abs(pixels_of(checked.data) - UPRIGHT).mean() < 4
    assert ("turned upright" in checked.changes) == (orientation != 1)
    if orientation != 1:
        assert not Image.open(BytesIO(checked.data)).getexif()


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_does_not_cost_the_picture(exif: bytes) -> None:
    assert examine(encoded(photo(1), exif=exif), "x.jpg", Limits()).width == 64


def grey(kind: type, most: int) -> Image.Image:
    """A ramp from black to white over the width."""
    return Image.fromarray(np.tile(np.linspace(0, most, 64).astype(kind), (48, 1)))


@pytest.mark.parametrize(
    ("image", "file_format"),
    [
        (grey(np.uint8, 255), "PNG"),
        (grey(np.uint8, 255), "JPEG"),
        (grey(np.uint16, 65535), "PNG"),
        (grey(np.uint16, 65535), "TIFF"),
        (grey(np.int32, 65535), "TIFF"),
        (grey(np.uint8, 255).convert("LA"), "PNG"),
        (grey(np.uint8, 255).quantize(), "PNG"),
        (grey(np.uint8, 255).convert("CMYK"), "JPEG"),
        (grey(np.uint8, 255).convert("RGB").convert("YCbCr"), "JPEG"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_every_mode_keeps_its_brightness(image: Image.Image, file_format: str) -> None:
    checked = examine(encoded(image, file_format), "x", Limits())
    expected = np.repeat(np.asarray(grey(np.uint8, 255))[..., None], 3, axis=2)
    assert np.abs(pixels_of(checked.data) - expected).mean() < 2


def test_sixteen_bits_a_colour_are_rounded_to_eight() -> None:
    import struct
    import zlib

    rows = b"".join(b"\0" + struct.pack(">3H", 0xFFFF, 0x8000, 0) * 32 for _ in range(32))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    checked = examine(data, "x.png", Limits())
    assert "16 bits to 8" in checked.changes
    assert np.abs(pixels_of(checked.data) - [255, 128, 0]).max() <= 3


def test_black_and_white_stay_so() -> None:
    image = grey(np.uint8, 255).convert("1", dither=Image.Dither.NONE)
    checked = examine(encoded(image, "PNG"), "x.png", Limits())
    assert set(np.unique(pixels_of(checked.data) // 64)) == {0, 3}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_can_not_be_seen_is_white(mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((200, 200, 200, 255), (0, 0, 16, 32))
    data = encoded(image.convert(mode) if mode != "P" else image.quantize(), "PNG")
    pixels = pixels_of(examine(data, "x.png", Limits()).data)
    assert np.abs(pixels[:, :12] - 200).max() <= 4
    assert np.abs(pixels[:, 20:] - 255).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("size", [None, 16])
def test_what_can_not_be_seen_is_kept_where_it_is_asked_for(mode: str, size: int | None) -> None:
    image = Image.new("RGBA", (32, 32), (90, 90, 90, 0))
    image.paste((200, 200, 200, 255), (0, 0, 16, 32))
    data = encoded(image.convert(mode) if mode != "P" else image.quantize(), "PNG")
    checked = examine(data, "x.jpg", Limits(size=size, keep_alpha=True))
    assert checked.suffix == ".png"
    assert (checked.data == data) == (mode == "RGBA" and size is None)
    assert "put on white" not in checked.changes
    kept = Image.open(BytesIO(checked.data))
    assert kept.mode == "RGBA"
    pixels = np.asarray(kept.resize((32, 32), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(pixels[:, :12] - [200, 200, 200, 255]).max() <= 4
    assert pixels[:, 20:, 3].max() <= 4
    if mode != "P":  # a palette has one colour that is see-through
        assert np.abs(pixels[:, 20:, :3] - 90).max() <= 4, "and its colours below too"


def test_a_mask_makes_another_picture_and_its_lack_makes_none() -> None:
    masked = photo(1).convert("RGBA")
    masked.putalpha(Image.linear_gradient("L").resize(masked.size))
    kept = Limits(keep_alpha=True)
    assert examine(encoded(masked, "PNG"), "x", kept).pixels != examine(PNG, "x", kept).pixels
    assert examine(jpeg(), "x.jpg", kept) == examine(jpeg(), "x.jpg", Limits())
    tiff = examine(encoded(masked, "TIFF"), "x.tif", kept)
    assert (tiff.suffix, tiff.changes) == (".png", ("TIFF to PNG",))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    data = encoded(photo(1), "WEBP", save_all=True, append_images=[photo(2)], lossless=True)
    checked = examine(data, "x.webp", Limits())
    assert "first frame of several" in checked.changes
    assert np.abs(pixels_of(checked.data) - UPRIGHT).mean() < 4


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty file"),
        (b"GIF89a", "not a picture"),
        (b"<html>404</html>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "not a picture"),  # would start Ghostscript
        (jpeg()[:700], "broken picture"),
        (PNG[:-40], "broken picture"),
        (PNG[:100] + b"\0" * 30 + PNG[130:], "broken picture"),
        (encoded(photo(1, 64, 15)), "too small"),
        (encoded(photo(1, 15, 64)), "too small"),
        (encoded(Image.fromarray(np.ones((32, 32), np.float32)), "TIFF"), "broken picture"),
    ],
    ids=range(10),
)
def test_what_can_not_be_used_is_rejected_with_a_reason(data: bytes, why: str) -> None:
    assert reason(data) == why


def test_limits_hold() -> None:
    assert examine(jpeg(1, 16, 20), "x.jpg", Limits()).width == 16
    assert reason(jpeg(1, 16, 20), Limits(min_side=17)) == "too small"
    assert examine(jpeg(), "x.jpg", Limits(max_pixels=64 * 48)).width == 64
    assert reason(jpeg(), Limits(max_pixels=64 * 48 - 1)) == "too many pixels"


def test_a_limit_of_pixels_above_pillows_own_holds_and_pillows_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert examine(jpeg(), "x.jpg", Limits()).width == 64
    assert reason(b"nonsense") == "not a picture"
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [((64, 48), 24, (32, 24)), ((48, 64), 24, (24, 32)), ((64, 48), 48, (64, 48)), ((64, 48), 100, (64, 48))],
)
def test_the_shorter_side_is_shrunk_and_never_enlarged(
    size: tuple[int, int], limit: int, expected: tuple[int, int]
) -> None:
    data = jpeg(1, *size)
    checked = examine(data, "x.jpg", Limits(size=limit))
    assert (checked.width, checked.height) == expected
    assert pixels_of(checked.data).shape == (*expected[::-1], 3)
    assert (checked.data == data) == (size == expected)


def test_equal_pixels_have_equal_hashes_in_whatever_file() -> None:
    hashes = {examine(encoded(photo(1), f, lossless=True), "x", Limits()).pixels for f in ("PNG", "WEBP", "BMP")}
    assert len(hashes) == 1
    assert examine(encoded(photo(2), "PNG"), "x", Limits()).pixels not in hashes


def test_alike_pictures_have_alike_perceptual_hashes_and_others_do_not() -> None:
    def phash(data: bytes) -> int:
        return examine(data, "x", Limits()).phash

    original = phash(PNG)
    for alike in (encoded(photo(1), quality=40), encoded(photo(1).resize((128, 96)), "PNG")):
        assert (original ^ phash(alike)).bit_count() <= 6
    others = [phash(jpeg(seed)) for seed in range(2, 30)]
    assert min((original ^ other).bit_count() for other in others) > 6


@settings(max_examples=200)
@given(
    source=st.sampled_from(
        [jpeg(), PNG, encoded(photo(1), "WEBP"), encoded(photo(1), "GIF"), encoded(photo(1), "TIFF"), b""]
    ),
    cut=st.integers(0, 2000),
    patches=st.lists(st.tuples(st.integers(0, 1999), st.binary(min_size=1, max_size=4)), max_size=5),
)
def test_damage_of_any_kind_is_rejected_or_overcome(source: bytes, cut: int, patches: list[tuple[int, bytes]]) -> None:
    """Whatever the bytes are: a picture within the limits comes out, or Rejected, and nothing else."""
    data = bytearray(source[:cut] if cut < 1500 else source)
    for at, patch in patches:
        data[at : at + len(patch)] = patch
    limits = Limits(max_pixels=100_000)
    try:
        checked = examine(bytes(data), "x.jpg", limits)
    except Rejected as error:
        assert error.reason
        return
    assert checked.width * checked.height <= limits.max_pixels
    assert pixels_of(checked.data).shape == (checked.height, checked.width, 3)
