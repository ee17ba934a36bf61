"""Pages that open offline: one style, and pictures within the file."""

from __future__ import annotations

import base64
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

THUMBNAIL = 200  # pixels of the longer side


def render(package: str, template: str, **values: Any) -> str:
    """The HTML of a template that lies in a package of ours; whatever `values` hold is text to it."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    style = files("limner.data").joinpath("page.css").read_text(encoding="utf-8")
    text = files(package).joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(style=Markup(style), **values)


def thumbnail(file: Path, side: int = THUMBNAIL) -> str:
    """A copy of a picture, its longer side of `side` pixels at most, as a data URL. Raises OSError."""
    with Image.open(file) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=72)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def inline(file: Path) -> str:
    """A PNG as it is, as a data URL. Raises OSError."""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
