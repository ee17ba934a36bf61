"""What may be drawn with, known by name: models, loaded when needed and unloaded when the memory is for another, and
LoRAs to add to them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from limner.errors import ConfigError
from limner.generation.jobs import Spec, count_parameters, read_spec
from limner.models import loading, lora
from limner.models.lora import Lora

if TYPE_CHECKING:
    from limner.generation.model import Model

Loaded = tuple[str, tuple[Lora, ...]]
"""A model's name, and what is added to it."""

BYTES = 4  # of a weight
MOST_WEIGHT = 10  # of a LoRA, either way


def read_models(refs: Sequence[str], find: Callable[[str], Path | None] = loading.resolve) -> dict[str, Spec]:
    """What each model says about itself, by the name that clients call it: `builtin`, a hub id or a folder's name.

    `find` tells where each lies. Raises ModelError where one can't be read, ConfigError where two have the same name.
    """
    specs: dict[str, Spec] = {}
    for ref in refs:
        spec = read_spec(ref, find(ref))
        name = ref if ref == "builtin" or loading.is_hub_id(ref) else spec.folder.resolve().name
        if name in specs:
            raise ConfigError(f"Two models are called {name}; rename one of the folders.")
        specs[name] = spec
    return specs


def read_reports(specs: Mapping[str, Spec], given: Mapping[str, Path]) -> dict[str, Path]:
    """The page that `limner evaluate` wrote of each model that has one: as given, or in the model's folder.

    Raises ConfigError where a page that was given, or its model, is not there.
    """
    for name, file in given.items():
        if name not in specs:
            raise ConfigError(f"reports names {name}, which is no model of this server; there are {', '.join(specs)}.")
        if not file.is_file():
            raise ConfigError(f"There is no report {file} of {name}; name the report.html that limner evaluate wrote.")
    pages = {name: spec.folder / "report.html" for name, spec in specs.items()} | dict(given)
    return {name: page for name, page in pages.items() if page.is_file()}


def read_loras(refs: Sequence[str]) -> dict[str, Lora]:
    """What each LoRA, FILE or FILE:WEIGHT, is, by the name that clients call it: that of its file or its run.

    Raises ModelError where one can't be read, ConfigError where two have the same name, or without PEFT.
    """
    loras: dict[str, Lora] = {}
    for ref in refs:
        lora.require_peft()
        found = lora.find(ref)
        name = Path(found.ref).resolve().name.removesuffix(".safetensors")
        if name in loras:
            raise ConfigError(f"Two LoRAs are called {name}; rename one of them.")
        loras[name] = found
    return loras


class Shelf:
    """Loaded models. For one thread: the worker's."""

    def __init__(
        self, specs: dict[str, Spec], loras: Mapping[str, Lora], device: str | None, memory: float | None
    ) -> None:
        """`memory` is what the weights may take, in GiB. Raises ConfigError for a device that is not there."""
        from limner.generation.setup import choose_device

        self.specs, self.loras = specs, loras
        self.device = choose_device(device)
        self._room = float("inf") if memory is None else memory * 2**30
        self._loaded: dict[Loaded, Model] = {}  # the one used last is last

    def chosen(self, texts: Sequence[str]) -> list[tuple[str, Lora]]:
        """The names and the LoRAs that texts, NAME or NAME:WEIGHT, mean. Raises ConfigError."""
        return list(map(self._chosen, texts))

    def _chosen(self, text: str) -> tuple[str, Lora]:
        name, _, tail = (text, "", "") if text in self.loras else text.rpartition(":")
        if name not in self.loras:
            there = f"there are {', '.join(self.loras)}" if self.loras else "there are none"
            raise ConfigError(f"There is no LoRA {text[:100]!r} here; {there}.")
        try:
            weight = float(tail) if tail else self.loras[name].weight
        except ValueError:
            weight = math.nan
        if not abs(weight) <= MOST_WEIGHT:
            raise ConfigError(f"The weight of the LoRA {name} must be from -{MOST_WEIGHT} to {MOST_WEIGHT}.")
        return name, replace(self.loras[name], weight=weight)

    @property
    def loaded(self) -> list[str]:
        """Names of the models that are loaded now; any thread may ask."""
        return [name for name, _ in list(self._loaded)]

    def get(self, name: str, loras: tuple[Lora, ...] = ()) -> Model:
        """A model, ready to draw. LoRAs are in its weights: one with some takes the place of one with others.

        Raises ModelError or ConfigError where it can't be loaded, or a LoRA is not for it.
        """
        model = self._loaded.pop((name, loras), None)
        if model is None:
            from limner.generation.model import Model

            if loras:
                self._unload([other for other in self._loaded if other[1]])
            self._make_room(self._bytes(name))
            model = Model(self.specs[name], str(self.device), loras)
        self._loaded[name, loras] = model
        return model

    def _bytes(self, name: str) -> int:
        return sum(count_parameters(self.specs[name]).values()) * BYTES

    def _make_room(self, wanted: int) -> None:
        while self._loaded and sum(map(self._bytes, self.loaded)) + wanted > self._room:
            self._unload([next(iter(self._loaded))])

    def _unload(self, those: Sequence[Loaded]) -> None:
        import torch

        for one in those:
            del self._loaded[one]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
