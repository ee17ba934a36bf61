"""Pictures in a terminal, as well as it can: its graphics protocol, sixels, or half characters in colour."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from limner.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


def check() -> None:
    """Raise ConfigError where pictures can't be shown, before time is spent on drawing them."""
    if not sys.stdout.isatty() or not os.get_terminal_size(sys.stdout.fileno()).columns:
        raise ConfigError("There is no terminal to show pictures in; leave out --show.")
    if find_spec("textual_image") is None:
        raise ConfigError("To show pictures in a terminal: pip install 'limner[show]'.")


def show(image: Image) -> None:
    """Print a picture, at its own size where the terminal has room, as `check` allows it."""
    from rich.console import Console
    from textual_image.renderable import Image as Shown  # asks the terminal what it can

    Console().print(Shown(image, width="auto"))
