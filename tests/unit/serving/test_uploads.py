"""What clients send to begin with: masks as OpenAI means them, and as Limner does."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("sqlalchemy")
from limner.serving.uploads import Uploads


@pytest.mark.parametrize(
    ("mode", "colour", "redrawn"),
    [
        ("RGBA", (0, 0, 0, 0), 255),
        ("RGBA", (255, 255, 255, 255), 255),  # nothing is see-through, so that white is what counts
        ("RGBA", (0, 0, 0, 255), 0),
        ("L", 255, 255),
    ],
)
def test_a_mask_is_see_through_or_else_white(
    mode: str, colour: int | tuple[int, ...], redrawn: int, tmp_path: Path
) -> None:
    file = io.BytesIO()
    Image.new(mode, (16, 16), colour).save(file, "PNG")
    uploads = Uploads(tmp_path, 1000)
    _, mask = uploads.read(uploads.white_mask(file.getvalue()), mask=True)
    assert mask.image.getextrema() == (redrawn, redrawn)
