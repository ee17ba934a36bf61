"""Is this a picture that can be trained on, and what does its caption really say?"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath

from PIL import Image, UnidentifiedImageError

from limner.data.findings import NOT_A_PICTURE, Rejected
from limner.data.pictures import eight_bits, upright

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")  # none that starts a program
SUFFIXES = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",)}  # kept as they are; first is the usual
JPEG_QUALITY = 95
FIRST_FRAME = "first frame of several"

CLIP_LENGTH = 77  # tokens of CLIP's text encoder, start and end included


@dataclass(frozen=True)
class Limits:
    """What a picture may be; see PrepareConfig."""

    size: int | None = None
    min_side: int = 16
    max_pixels: int = 100_000_000
    keep_alpha: bool = False


@dataclass(frozen=True)
class Checked:
    """A picture that decodes, ready to be written."""

    data: bytes
    suffix: str
    width: int
    height: int
    pixels: str
    """Hash of size and pixels; equal for equal pictures in whatever lossless file."""
    phash: int
    """Perceptual hash, 64 bits; pictures that look alike differ in few of them."""
    changes: tuple[str, ...]
    """What was done to the file; nothing for one that is as it was."""


def examine(data: bytes, name: str, limits: Limits) -> Checked:
    """Decode a picture and bring it to upright 8-bit RGB; a file that is so already keeps its bytes.

    With `keep_alpha` one that has an alpha channel, or a colour for see-through, becomes RGBA instead, and keeps the
    colours below.

    Raises Rejected with the reason why it can't be used, whatever the bytes are.
    """
    rgb, file_format, changes = decode(data, limits)
    if limits.size is not None and min(rgb.size) > limits.size:
        scale = limits.size / min(rgb.size)
        rgb = _resized(rgb, (round(rgb.width * scale), round(rgb.height * scale)))
        changes.append("shrunk")
    return _checked(data, name, file_format, rgb, changes)


def decode(data: bytes, limits: Limits) -> tuple[Image.Image, str, list[str]]:
    """The picture as `examine` brings it, before it is shrunk, Pillow's name of its format, and what was done to it.

    Nothing is decoded before the header was held against the limits. Raises Rejected.
    """
    if not data:
        raise Rejected("empty file")
    with _our_pixel_limit(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image: Image.Image = Image.open(BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise Rejected(NOT_A_PICTURE, "its content is of no known format") from None
        except Exception as error:  # Pillow's readers raise many kinds on damaged headers
            raise Rejected("broken picture", str(error)) from None
        size = f"{image.width}x{image.height}"
        if image.width * image.height > limits.max_pixels:
            raise Rejected("too many pixels", f"{size}, says its header")
        if min(image.size) < limits.min_side:
            raise Rejected("too small", size)
        try:
            image.load()
            rgb, changes = _upright_rgb(image, data, limits.keep_alpha)
        except Rejected:
            raise
        except Exception as error:
            raise Rejected("broken picture", str(error)) from None
    return rgb, image.format or "", changes


def _checked(data: bytes, name: str, file_format: str, rgb: Image.Image, changes: list[str]) -> Checked:
    import imagehash

    before = PurePosixPath(name).suffix.lower()
    if file_format in SUFFIXES and not changes:
        suffix = before if before in SUFFIXES[file_format] else SUFFIXES[file_format][0]
    else:
        target = "PNG" if rgb.mode == "RGBA" else "JPEG"
        suffix = before if before in SUFFIXES[target] else SUFFIXES[target][0]
        if not changes:
            changes.append(f"{file_format} to {target}")
        data = _encoded(rgb)
    if file_format in SUFFIXES and before not in SUFFIXES[file_format]:
        changes.append(f"named {suffix} instead of {before or 'nothing'}")
    pixels = hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()
    phash = int(str(imagehash.phash(rgb)), 16)
    return Checked(data, suffix, rgb.width, rgb.height, pixels, phash, tuple(changes))


def _resized(rgb: Image.Image, size: tuple[int, int]) -> Image.Image:
    resized = rgb.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    if rgb.mode == "RGBA":  # by itself, as Pillow would blacken what is see-through
        resized.putalpha(rgb.getchannel("A").resize(size, Image.Resampling.LANCZOS))
    return resized


def _encoded(rgb: Image.Image) -> bytes:
    buffer = BytesIO()
    profile = rgb.info.get("icc_profile")
    if rgb.mode == "RGBA":
        rgb.save(buffer, "PNG", icc_profile=profile)
        return buffer.getvalue()
    rgb.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4", icc_profile=profile)
    return buffer.getvalue()


def _upright_rgb(image: Image.Image, data: bytes, keep_alpha: bool) -> tuple[Image.Image, list[str]]:
    """The picture as people see it, in mode RGB or perhaps RGBA, and what was done to it."""
    changes: list[str] = []
    if getattr(image, "n_frames", 1) > 1:
        changes.append(FIRST_FRAME)
    turned = upright(image)
    if turned is not image:
        changes.append("turned upright")
    if image.format == "PNG" and image.mode == "RGB" and data[24:25] == b"\x10":  # bit depth in its header
        changes.append("16 bits to 8")  # Pillow did it while decoding
    rgb = _rgb(turned, keep_alpha)
    if image.mode != rgb.mode:
        changes.append(f"{image.mode} to {rgb.mode}")
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
    rgb.info = {} if profile is None else {"icc_profile": profile}
    if image.has_transparency_data and not keep_alpha:
        changes.append("put on white")
    return rgb, changes


def _rgb(image: Image.Image, keep_alpha: bool) -> Image.Image:
    image = eight_bits(image)
    if image.mode == "F":
        raise Rejected("broken picture", "floating-point pixels, whose range is unknown")
    if image.has_transparency_data:
        see_through = image.convert("RGBA")
        if keep_alpha:
            return see_through
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, see_through).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _our_pixel_limit() -> Iterator[None]:
    """Pillow's limit off: `max_pixels` is held against the header before anything is decoded."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


_BEFORE = re.compile(r" +(?=[;:!?)]|[.,](?!\d)|'s\b|n't\b)")
_AFTER = re.compile(r"(?<=\() +")
_QUOTED = re.compile(r'(?<!\w)"([^"]*)"')  # the mark behind a word or a number closes, or means inches


def clean_caption(text: str) -> str:
    """A caption as one would print it: one line, no spaces before full stops or inside quotes, no control characters.

    Removes characters and never adds or replaces one but white space, so the words stay as they were.
    "" where nothing is left to read.
    """
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    text = " ".join(text.replace("\ufeff", "").split())
    text = _AFTER.sub("", _BEFORE.sub("", text))
    text = _QUOTED.sub(lambda quoted: f'"{quoted[1].strip()}"', text)
    return text if any(c.isalnum() for c in text) else ""


_WORDLESS = {
    "a",
    "an",
    "the",
    "broken image",
    "no image",
    "image not found",
    "no caption",
    "none",
    "null",
    "nan",
    "n/a",
}


def is_junk(caption: str) -> bool:
    """Whether a cleaned caption says nothing of its picture ("A", "broken image"). One word, like "dog", may."""
    return caption.lower().strip(" .") in _WORDLESS


# CLIP's own pre-tokenizer: contractions, runs of letters, single digits, runs of other signs.
_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


def estimate_tokens(caption: str) -> int:
    """CLIP tokens of a caption with start and end, estimated, as the vocabulary is not part of Limner.

    Pieces are cut as CLIP cuts them; a piece of ASCII counts one token for every eight letters begun (common words
    are one token), any other character counts one a byte of UTF-8, which is the most it can take. Against the real
    tokenizer, on 65,014 captions of Flickr8k and COCO: 0.08 tokens too many on average, off by 7 at most; of texts
    over 77 tokens made by joining them, 1 % was taken for shorter.
    """
    count = 2
    for piece in _PIECES.findall(caption):
        count += -(-len(piece) // 8) if piece.isascii() else len(piece.encode())
    return count
