"""A tiny model for the tests of drawing."""

from __future__ import annotations

from pathlib import Path

import pytest

from limner.generation.model import Model
from tiny import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that draws 16x16 pixels with DDIM."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def model(folder: Path) -> Model:
    """That model, loaded in fp32."""
    return Model.load(str(folder), "cpu", precision="fp32")
