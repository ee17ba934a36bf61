"""torch-fidelity, the tests' oracle for distances, without the torchvision that it imports and they never use."""

from __future__ import annotations

import importlib
import sys
from typing import Any
from unittest.mock import MagicMock, patch

UNUSED = ["torchvision" + below for below in ("", ".datasets", ".models", ".transforms", ".transforms.functional")]


def part(name: str) -> Any:
    """The module torch_fidelity.`name`."""
    with patch.dict(sys.modules, {name: MagicMock() for name in UNUSED}):
        found = importlib.import_module(f"torch_fidelity.{name}")
        loaded = {key: module for key, module in sys.modules.items() if key.startswith("torch_fidelity")}
    sys.modules.update(loaded)
    return found
