"""Models whose networks are Diffusers' and Transformers', where a test calls them as those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from limner.generation.model import Model
from limner.models import loading


def load_with_libraries(folder: Path, **settings: Any) -> Model:
    """A model in fp32 that is loaded as where something is added to its networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("limner.generation.painters.plain", loading)
        return Model.load(str(folder), "cpu", precision="fp32", **settings)
