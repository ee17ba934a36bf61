"""The models that may be drawn with: known by name, loaded when needed, unloaded when the memory is for another."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

from limner.errors import ConfigError
from limner.generation.jobs import Spec, count_parameters, read_spec
from limner.models import loading

if TYPE_CHECKING:
    from limner.generation.model import Model

BYTES = 4  # of a weight


def read_models(refs: Sequence[str]) -> dict[str, Spec]:
    """What each model says about itself, by the name that clients call it: `builtin`, a hub id or a folder's name.

    Raises ModelError where one can't be read, ConfigError where two have the same name.
    """
    specs: dict[str, Spec] = {}
    for ref in refs:
        spec = read_spec(ref)
        name = ref if ref == "builtin" or loading.is_hub_id(ref) else spec.folder.resolve().name
        if name in specs:
            raise ConfigError(f"Two models are called {name}; rename one of the folders.")
        specs[name] = spec
    return specs


class Shelf:
    """Loaded models. For one thread: the worker's."""

    def __init__(self, specs: dict[str, Spec], device: str | None, memory: float | None) -> None:
        """`memory` is what the weights may take, in GiB. Raises ConfigError for a device that is not there."""
        from limner.generation.model import choose_device

        self.specs = specs
        self.device = choose_device(device)
        self._room = float("inf") if memory is None else memory * 2**30
        self._loaded: dict[str, Model] = {}  # the one used last is last

    @property
    def loaded(self) -> list[str]:
        """Names of the models that are loaded now."""
        return list(self._loaded)

    def get(self, name: str) -> Model:
        """A model, ready to draw. Raises ModelError or ConfigError where it can't be loaded."""
        model = self._loaded.pop(name, None)
        if model is None:
            from limner.generation.model import Model

            self._make_room(self._bytes(name))
            model = Model(self.specs[name], str(self.device))
        self._loaded[name] = model
        return model

    def _bytes(self, name: str) -> int:
        return sum(count_parameters(self.specs[name]).values()) * BYTES

    def _make_room(self, wanted: int) -> None:
        import torch

        while self._loaded and sum(map(self._bytes, self._loaded)) + wanted > self._room:
            del self._loaded[next(iter(self._loaded))]
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
