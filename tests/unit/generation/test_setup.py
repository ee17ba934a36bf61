"""Precision is chosen by what a machine can do, and little memory changes no picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limner import load
from limner.errors import ConfigError
from limner.generation import setup
from limner.generation.jobs import Job
from limner.generation.model import Model
from limner.models import loading

CPU = torch.device("cpu")


@pytest.mark.parametrize("able", [{}, {"avx512_f": True, "avx512_bf16": False}, {"avx512_bf16": True}, {"amx_bf16": 1}])
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch, able: dict[str, Any]) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
    expected = "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"
    assert setup.choose(CPU).precision == expected
    assert setup.choose(CPU, "fp32").precision == "fp32"
    assert setup.choose(CPU, "bf16").precision == "bf16"
    assert setup.choose(CPU, low_memory=True).precision == "bf16"
    assert setup.choose(CPU, "fp32", low_memory=True).precision == "fp32"


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"engine": "abacus"}])
def test_a_precision_or_engine_that_is_not_there_is_named(folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"There is no {next(iter(settings))} '.*'; choose one of"):
        load(str(folder), device="cpu", **settings)


def test_bf16_draws_about_the_same_picture_and_says_so(folder: Path) -> None:
    exact, fast = (load(str(folder), device="cpu", precision=precision) for precision in ("fp32", "bf16"))
    assert {parameter.dtype for parameter in fast.painter.unet.parameters()} == {torch.bfloat16}
    drawn = [np.asarray(model("A dog.", steps=4).images[0]).astype(int) for model in (exact, fast)]
    other = np.asarray(exact("A dog.", steps=4, seed=1).images[0]).astype(int)
    assert 0 < np.abs(drawn[0] - drawn[1]).mean() < 0.1 * np.abs(drawn[0] - other).mean()
    assert [model.device_facts["precision"] for model in (exact, fast)] == ["fp32", "bf16"]


def test_prompts_are_encoded_once(folder: Path) -> None:
    model = Model.load(str(folder), "cpu", precision="fp32")
    seen: list[int] = []
    model.painter.text_encoder.register_forward_hook(lambda *_: seen.append(1))
    first = model("A dog.", n=3, steps=1)
    assert len(seen) == 1
    again = model(["A dog.", "A cat."], steps=1)
    assert len(seen) == 2
    assert first.images[0].tobytes() == again.images[0].tobytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_little_memory_draws_the_same_with_one_network_at_a_time(folder: Path, precision: Any) -> None:
    usual = Model.load(str(folder), "cpu", precision=precision)
    lean = Model.load(str(folder), "cpu", precision=precision, low_memory=True)
    settings: dict[str, Any] = {"n": 2, "steps": 2, "guidance": 3.0}
    both = (np.stack(model(["A dog.", "A cat."], **settings).images).astype(int) for model in (usual, lean))
    apart = np.abs(np.subtract(*both))  # by rounding: there is no memory for weights that lie otherwise
    assert apart.max() <= 1 if precision == "fp32" else apart.mean() < 2
    held = {
        name: sum(t.untyped_storage().nbytes() for t in getattr(lean.painter, name).parameters())
        for name in ("text_encoder", "unet", "vae")
    }
    assert held["vae"] == sum(t.untyped_storage().nbytes() for t in usual.painter.vae.parameters()), "the last one used"
    assert max(held["unet"], held["text_encoder"]) < 2000, "a few bytes for each of the others' weights"


def test_little_memory_reads_no_network_while_a_picture_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what looks at it, as a ranker, would compute in the precision that is read (found in ten thousand calls)."""
    lean = Model.load(str(folder), "cpu", precision="bf16", low_memory=True)
    read, begun = loading.load_unet, []

    def counted(ref: str, dtype: Any) -> Any:
        begun.append(dtype)
        return read(ref, dtype)

    def job(seed: int) -> Job:
        return Job("A dog.", negative="", seed=seed, steps=1, guidance=3.0, width=16, height=16)

    monkeypatch.setattr(loading, "load_unet", counted)
    for number, _ in enumerate(lean.draw([job(seed) for seed in range(3)])):
        time.sleep(0.05)
        assert len(begun) == number + 1
        assert torch.get_default_dtype() == torch.float32


def test_large_pictures_are_decoded_in_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limner.models.vae.TILE", 32)
    usual, lean = (Model.load(str(folder), "cpu", precision="fp32", low_memory=low) for low in (False, True))
    seen: list[torch.Size] = []
    lean.painter.vae.decoder.register_forward_hook(lambda module, given, result: seen.append(result.shape))
    whole, tiled = (np.asarray(m("A dog.", steps=1, size=64).images[0]).astype(int) for m in (usual, lean))
    assert max(shape[-1] for shape in seen) == 32
    assert whole.shape == tiled.shape == (64, 64, 3)
    assert np.abs(whole - tiled).mean() < 0.5 * whole.std(), "group norms see a tile alone, no more"
    assert np.array_equal(*(np.asarray(m("A dog.", steps=1, size=32).images[0]) for m in (usual, lean))), (
        "small pictures are decoded whole"
    )
