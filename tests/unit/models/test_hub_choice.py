"""Which files of a hub model are fetched, which models are refused, and what counts as a hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limner.errors import ModelError
from limner.models import hub

INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.36.0",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "image_encoder": [None, None],
    "requires_safety_checker": True,
}


def test_the_parts_are_those_that_the_index_names_and_limner_loads() -> None:
    assert set(hub.pipeline_parts(INDEX)) == {"unet", "text_encoder"}
    assert hub.pipeline_parts({}) == {}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("unet/diffusion_pytorch_model.safetensors", None),
        ("unet/diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("unet/diffusion_pytorch_model-00001-of-00002.safetensors", None),
        ("unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("unet/diffusion_pytorch_model.safetensors.index.json", None),
        ("unet/diffusion_pytorch_model.safetensors.index.fp16.json", None),
        ("unet/diffusion_pytorch_model.non_ema.safetensors", "non_ema"),
        ("scheduler/scheduler_config.json", None),
    ],
)
def test_variants_are_read_off_the_names_of_weights(name: str, variant: str | None) -> None:
    assert hub.variant_of(name) == variant


def test_weights_are_fetched_once_and_code_pickles_and_extras_not_at_all() -> None:
    wanted = [
        "model_index.json",
        "unet/config.json",
        "unet/model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",  # the only one there is
        "clip/model.safetensors",
    ]
    others = [
        "README.md",
        "sd-v1-5.safetensors",
        "unet/model.fp16.safetensors",
        "unet/model.bin",
        "unet/code.py",
        "safety_checker/model.safetensors",
        "vae_old/model.safetensors",
    ]
    assert hub.choose(wanted + others, INDEX) == wanted


def files(folder: Path, *names: str) -> None:
    """Put empty files into a folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_one_variant_of_the_weights_is_read(tmp_path: Path) -> None:
    files(tmp_path, "m.fp16.safetensors", "m.bf16.safetensors", "config.json")
    assert [file.name for file in hub.weight_files(tmp_path)] == ["m.bf16.safetensors"]
    files(tmp_path, "m-00002-of-00002.safetensors", "m-00001-of-00002.safetensors")
    assert [file.name for file in hub.weight_files(tmp_path)] == [
        "m-00001-of-00002.safetensors",
        "m-00002-of-00002.safetensors",
    ]


def test_a_cached_model_is_whole_when_each_part_has_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    files(repo, "refs/main")
    (repo / "refs" / "main").write_text("0" * 40)
    files(snapshot, "tokenizer/vocab.json", "text_encoder/config.json", "text_encoder/model.safetensors")
    tokenizer = {"tokenizer": ["transformers", "CLIPTokenizer"]}
    (snapshot / "model_index.json").write_text(json.dumps(INDEX | tokenizer))
    for name in ("unet/config.json", "unet/m-00002-of-00002.safetensors"):
        assert hub.cached("owner/model") is None
        files(snapshot, name)
    assert hub.cached("owner/model") is None, "there are two shards"
    files(snapshot, "unet/m-00001-of-00002.safetensors")
    assert hub.cached("owner/model") == snapshot
    files(snapshot, "clip/config.json")
    assert hub.cached("owner/model") is None, "its CLIP has no weights yet"
    files(snapshot, "clip/model.safetensors")
    assert hub.cached("owner/model") == snapshot
    whole = (snapshot / "model_index.json").read_text()
    (snapshot / "model_index.json").write_text(whole[:20])
    assert hub.cached("owner/model") is None, "cut off"
    (snapshot / "model_index.json").write_text(whole)
    (snapshot / "model_index.json").rename(snapshot / "config.json")
    assert hub.cached("owner/model") is None, "a single part, without weights"
    files(snapshot, "model.safetensors")
    assert hub.cached("owner/model") == snapshot


def test_of_a_single_part_all_is_fetched_that_can_be_read() -> None:
    names = [
        "config.json",
        "model.safetensors",
        "merges.txt",
        "pytorch_model.bin",
        "onnx/model.json",
        "flax_model.msgpack",
    ]
    assert hub.choose(names, {}) == ["config.json", "model.safetensors", "merges.txt"]


@pytest.mark.parametrize(
    ("index", "names", "refused"),
    [
        (INDEX, ["unet/a.bin", "text_encoder/a.safetensors"], True),
        (INDEX, ["unet/a.bin", "unet/a.safetensors", "text_encoder/a.safetensors"], False),
        (INDEX, ["safety_checker/a.bin", "unet/a.safetensors"], False),
        ({}, ["pytorch_model.bin"], True),
        ({}, ["model.ckpt", "model.safetensors"], False),
    ],
)
def test_weights_that_are_only_pickles_are_refused(index: dict[str, Any], names: list[str], refused: bool) -> None:
    wanted = [name for name in names if name.endswith(".safetensors")]
    if refused:
        with pytest.raises(ModelError, match="only as a pickle"):
            hub.refuse_pickles(names, wanted, index, "owner/name")
    else:
        hub.refuse_pickles(names, wanted, index, "owner/name")


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": ["pipeline", "MyPipeline"]},
        {"unet": ["my_unet", "MyUnet"]},
        {"unet": ["os", "system"]},
        {"unet": ["../x", "Y"]},
    ],
)
def test_code_in_place_of_a_class_is_refused(changes: dict[str, Any]) -> None:
    hub.refuse_code(INDEX, "owner/name")
    with pytest.raises(ModelError, match="Python code of its own"):
        hub.refuse_code({**INDEX, **changes}, "owner/name")


def test_an_index_without_a_class_is_refused() -> None:
    with pytest.raises(ModelError, match="names no pipeline"):
        hub.refuse_code({}, "owner/name")


@pytest.mark.parametrize(
    ("ref", "is_id"),
    [
        ("owner/name", True),
        ("gpt2", True),
        ("owner/name@v1.0", True),
        ("owner/name@refs/pr/1", True),
        ("./model", False),
        ("/models/x", False),
        ("a/b/c", False),
        ("owner/na me", False),
        ("../x", False),
        ("", False),
    ],
)
def test_hub_ids_are_told_from_paths(ref: str, is_id: bool) -> None:
    assert hub.looks_like_hub_id(ref) is is_id
