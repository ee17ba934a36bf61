"""Drawn with OpenVINO, a picture is nearly torch's, always the same, and says what drew it."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from commands import limner
from limner.artifacts import PARTIAL
from limner.errors import ConfigError, ModelError
from limner.generation import openvino, provenance
from limner.generation.model import Model
from limner.models import export, loading
from tiny import tiny_model, tiny_unet

installed = pytest.mark.skipif(find_spec("openvino") is None, reason="needs OpenVINO")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that tests share, as converting takes seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _in_the_shared_cache(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMNER_CACHE", str(shared))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(folder: Path, engine: Any = "openvino", **settings: Any) -> Model:
    """A model on the CPU."""
    return Model.load(str(folder), "cpu", precision="fp32", engine=engine, **settings)


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures in a colour of a pixel."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


@installed
@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": 4.0},
        {"guidance": 1.0},
        {"guidance": 4.0, "size": "24x32", "n": 2},
        {"guidance": 4.0, "size": "28x20"},
        {"guidance": 3.0, "prompt": "a " * 100},
        {"guidance": 4.0, "steps": 5, "reuse": 2},
    ],
    ids=str,
)
def test_it_draws_what_torch_draws(folder: Path, settings: dict[str, Any]) -> None:
    given = {"prompt": "A dog.", "steps": 3, **settings}
    prompt = given.pop("prompt")
    ours, theirs = (load(folder, engine)(prompt, **given).images for engine in ("openvino", "torch"))
    assert max(map(apart, ours, theirs)) <= 1
    assert np.asarray(ours[0]).std() > 5


@installed
def test_a_u_net_with_guidance_as_an_input_is_drawn_with_too(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "folded", unet=tiny_unet(time_cond_proj_dim=16))
    pictures = [
        [load(folder, engine)("A dog.", steps=2, guidance=guidance).images[0] for guidance in (2.0, 9.0)]
        for engine in ("openvino", "torch")
    ]
    assert max(map(apart, *pictures)) <= 1
    assert apart(*pictures[0]) > 1


@installed
def test_what_is_converted_is_kept_and_drawn_with_alike(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 2, "guidance": 4.0, "size": 32}
    first = load(folder)("A dog.", seed=5, **settings).images[0]
    kept = sorted(path.name for path in cache.glob("openvino/*/*"))
    assert kept == ["decoder", "unet"]
    monkeypatch.setattr(loading, "load_unet", None)  # it is not read any more
    later = load(folder)
    assert later("A dog.", seed=5, **settings).images[0].tobytes() == first.tobytes()
    many = later(["A cat.", "A dog."], seed=4, n=2, **settings).images
    assert many[3].tobytes() == first.tobytes()
    assert sorted(path.name for path in cache.glob("openvino/*/*")) == kept


@installed
def test_other_weights_are_converted_anew(tmp_path: Path, cache: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    before = load(folder)("A dog.", steps=2).images[0]
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert apart(before, load(folder)("A dog.", steps=2).images[0]) > 1
    assert len(list(cache.glob("openvino/*"))) == 2
    for file in cache.rglob("step.xml"):
        file.write_text("<net>")
    with pytest.raises(ModelError, match=r"is not what was written there; delete .*unet\.$"):
        load(folder)("A dog.", steps=2)


@installed
def test_what_was_used_least_recently_makes_room(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = [cache / "openvino" / name for name in ("long-ago", "lately")]
    for days, model in zip((9, 1), used):
        (model / "decoder").mkdir(parents=True)
        (model / "decoder" / "decoder.bin").write_bytes(bytes(1000))
        os.utime(model, (time.time() - days * 86400,) * 2)
    load(folder)("A dog.", steps=1)
    assert all(model.is_dir() for model in used), "there is room"
    (own,) = set((cache / "openvino").iterdir()) - set(used)
    monkeypatch.setattr(openvino, "ROOM", 1500 + sum(file.stat().st_size for file in own.rglob("*") if file.is_file()))
    openvino.make_room(own)
    assert set((cache / "openvino").iterdir()) == {own, used[1]}
    monkeypatch.setattr(openvino, "ROOM", 0)
    openvino.make_room(own)
    assert set((cache / "openvino").iterdir()) == {own}


@installed
def test_the_record_says_so_and_it_is_replayed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", folder, "--device", "cpu", "--precision", "fp32"]
    assert limner("generate", "A dog.", *model, "--engine", "openvino") == 0
    record = provenance.read(Path("pictures/a-dog-0.png"))
    assert record["device"]["engine"] == "openvino"
    assert "openvino" in record["versions"]
    capfd.readouterr()
    assert limner("replay", "pictures/a-dog-0.png") == 0
    assert capfd.readouterr().out.splitlines() == ["identical"]
    torchs = load(folder, "torch")("A dog.", steps=1).pictures[0].record
    assert "device engine: openvino then, torch now" in provenance.differences(record, torchs)


@installed
def test_a_full_disk_leaves_nothing_in_the_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        load(folder)("A dog.", steps=1)
    assert not [path for path in cache.rglob("*") if PARTIAL in path.name or path.is_file()]


@installed
def test_what_it_can_not_do_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave out --low-memory or --engine"):
        load(folder, low_memory=True)
    with pytest.raises(ModelError, match="is of a kind that is drawn with torch; leave out --engine"):
        load(tiny_model(tmp_path / "odd", unet=tiny_unet(act_fn="gelu")))("A dog.", steps=1)
    core = export.import_openvino().Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(ConfigError, match="leave out --precision here"):
            Model.load(str(folder), "cpu", precision="bf16", engine="openvino")


def test_without_openvino_it_is_said_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"openvino is not installed; .* pip install 'limner\[openvino\]'"):
        load(folder)
