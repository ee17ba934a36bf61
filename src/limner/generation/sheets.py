"""Many pictures on one: grids with labelled columns and rows, and contact sheets. No pixel is scaled."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

GREY = "#555555"
GAP, LEAST_TEXT, LEAST_WIDTH = 6, 13, 320  # in pixels


def grid(columns: Mapping[str, Sequence[Image]], captions: Sequence[str], title: str = "") -> Image:
    """Pictures side by side: a column a label, a row a caption, which stands above it; over all perhaps a title.

    Raises ValueError where a column has not a picture a caption.
    """
    from PIL import Image as Images
    from PIL import ImageDraw

    images = [image for column in columns.values() for image in column]
    width = max(image.width for image in images)
    font, line = _font(width)
    cell = GAP + max(width, *(math.ceil(font.getlength(label)) for label in columns))
    across = max(LEAST_WIDTH, GAP + cell * len(columns))
    rows = list(zip(captions, *columns.values(), strict=True))
    texts = [_wrapped(caption, font, across) for caption in captions]
    heading = _wrapped(title, font, across)
    heights = [max(image.height for image in row) for _, *row in rows]
    below = 2 * GAP * len(rows) + GAP + line * (len(heading) + 1 + sum(map(len, texts))) + sum(heights)
    sheet = Images.new("RGB", (across, below), "white")
    pen = ImageDraw.Draw(sheet)
    for number, part in enumerate(heading):
        pen.text((GAP, GAP + line * number), part, "black", font)
    top = GAP + line * len(heading)
    for x, label in enumerate(columns):
        pen.text((GAP + cell * x, top), label, GREY, font)
    top += line
    for text, height, (_, *row) in zip(texts, heights, rows):
        for part in text:
            pen.text((GAP, top), part, "black", font)
            top += line
        for x, image in enumerate(row):
            sheet.paste(image, (GAP + cell * x, top))
        top += height + 2 * GAP
    return sheet


def contact(images: Sequence[Image], labels: Sequence[str]) -> Image:
    """Pictures in their order on about a square, each under its label."""
    from PIL import Image as Images
    from PIL import ImageDraw

    width, height = max(image.width for image in images), max(image.height for image in images)
    font, line = _font(width)
    texts = [_wrapped(label, font, width + GAP) for label in labels]
    deep = height + line * max(map(len, texts))
    count = len(images)
    across = min(count, max(1, round(math.sqrt(count * (deep + GAP) / (width + GAP)))))
    sheet = Images.new("RGB", (GAP + across * (width + GAP), GAP + -(-count // across) * (deep + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = GAP + number % across * (width + GAP), GAP + number // across * (deep + GAP)
        for i, part in enumerate(text):
            pen.text((left, top + line * i), part, GREY, font)
        sheet.paste(image, (left, top + deep - height))
    return sheet


def _wrapped(text: str, font: FreeTypeFont | ImageFont, width: int) -> list[str]:
    """Lines that fit between gaps on so many pixels."""
    return textwrap.wrap(text, max(1, int((width - 2 * GAP) / font.getlength("n"))))


def _font(width: int) -> tuple[FreeTypeFont | ImageFont, int]:
    """A font for pictures of this width, and the height of a line: matplotlib's DejaVu Sans, which knows most
    alphabets; where that is not installed, Pillow's own: ASCII."""
    from PIL import ImageFont

    size = max(LEAST_TEXT, width // 20)
    line = math.ceil(1.4 * size)
    try:
        import matplotlib
    except ImportError:
        return ImageFont.load_default(size), line
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size), line
