"""Models by name: loaded when needed, unloaded when another needs the memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from limner.errors import ConfigError, ModelError
from limner.generation.jobs import count_parameters, read_spec
from limner.generation.model import Model
from limner.serving.shelf import Shelf, read_loras, read_models
from tiny import WIDTH, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one size."""
    place = tmp_path_factory.mktemp("shelf")
    return [tiny_model(place / name) for name in "abc"]


def test_the_one_used_longest_ago_goes(folders: list[Path]) -> None:
    gib = sum(count_parameters(read_spec(str(folders[0]))).values()) * 4 / 2**30
    shelf = Shelf(read_models([str(folder) for folder in folders]), {}, "cpu", 2.5 * gib)
    first = weakref.ref(shelf.get("a"))
    second = shelf.get("b")
    assert shelf.get("a") is first()
    shelf.get("c")
    assert shelf.loaded == ["a", "c"]
    assert shelf.get("b") is not second
    gc.collect()
    assert first() is None, "its memory is free"


def test_one_that_is_larger_than_the_limit_is_loaded_alone(folders: list[Path]) -> None:
    shelf = Shelf(read_models([str(folder) for folder in folders]), {}, "cpu", 1e-9)
    for name in "ab":
        shelf.get(name)
        assert shelf.loaded == [name]


def test_a_model_with_a_lora_takes_the_place_of_one_with_another(folders: list[Path], tmp_path: Path) -> None:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    file = tmp_path / "wild.safetensors"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, WIDTH), f"{layer}.lora_B.weight": torch.ones(WIDTH, 2)}, file)
    shelf = Shelf(read_models([str(folders[0])]), read_loras([f"{file}:0.7"]), "cpu", None)

    def get(*texts: str) -> Model:
        return shelf.get("a", tuple(lora for _, lora in shelf.chosen(texts)))

    plain, wild = get(), get("wild")
    assert get("wild:0.7") is wild
    assert get() is plain
    assert get("wild:0.5") is not wild
    assert shelf.loaded == ["a", "a"]
    assert get() is plain, "that stays"
    assert get("wild") is not wild


def test_names(folders: list[Path], tmp_path: Path) -> None:
    assert list(read_models(["builtin", str(folders[1])])) == ["builtin", "b"]
    with pytest.raises(ConfigError, match="Two models are called a"):
        read_models([str(folders[0]), str(tiny_model(tmp_path / "a"))])
    with pytest.raises(ModelError):
        read_models([str(tmp_path / "missing")])
