"""Finding and reading models and their parts, from every kind of folder that holds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from limner.errors import ModelError
from limner.models import loading
from tiny import (
    SCHEDULERS,
    tiny_clip,
    tiny_model,
    tiny_scheduler,
    tiny_taesd,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder with a CLIP."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    tiny_clip().save_pretrained(folder / "clip")
    tiny_tokenizer(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `train clip`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "checkpoints").mkdir()
    tiny_clip().save_pretrained(folder / "model" / "clip")
    tiny_tokenizer(folder / "model" / "clip")
    return folder


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two networks hold the same numbers under the same names."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- references


def test_a_folder_is_itself(model: Path) -> None:
    assert loading.resolve(str(model)) == model
    assert not loading.is_hub_id(str(model))


def test_a_name_that_lies_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert loading.is_hub_id("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not loading.is_hub_id("owner/name")
    assert not loading.is_hub_id("builtin")


def test_the_built_in_model_is_there_or_its_absence_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BUILTIN", tmp_path)
    with pytest.raises(ModelError, match="no built-in model"):
        loading.resolve("builtin")
    (tmp_path / "model_index.json").write_text("{}")
    assert loading.resolve("builtin") == tmp_path


# ---- parts


@pytest.mark.parametrize("part", loading.CLASSES)
def test_a_part_is_found_in_a_model_a_run_and_its_own_folder(model: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(model / part, tmp_path / "run" / "model" / part)
    for ref, place in (
        (model, model / part),
        (model / part, model / part),
        (tmp_path / "run", tmp_path / "run" / "model" / part),
        (tmp_path / "run" / "model", tmp_path / "run" / "model" / part),
    ):
        assert loading.component(str(ref), part) == place


def test_a_part_that_is_missing_is_named_with_what_there_is(run: Path) -> None:
    with pytest.raises(ModelError, match=r"has no U-Net that Limner can use \(it holds clip\)"):
        loading.component(str(run), "unet")


def test_a_part_of_another_class_is_named(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet1DModel"}')
    with pytest.raises(ModelError, match="its U-Net is of class UNet1DModel"):
        loading.component(str(tmp_path), "unet")


def test_a_run_without_a_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ModelError, match="no result yet"):
        loading.component(str(tmp_path), "vae")


# ---- networks


@pytest.mark.parametrize(
    ("load", "original"),
    [
        (loading.load_unet, tiny_unet),
        (loading.load_vae, tiny_vae),
        (lambda ref: loading.load_text_encoder(ref)[0], tiny_text_encoder),
        (lambda ref: loading.load_clip(ref)[0], tiny_clip),
    ],
    ids=["unet", "vae", "text encoder", "clip"],
)
def test_a_network_comes_back_with_its_weights_ready_to_use(model: Path, load: Any, original: Any) -> None:
    network = load(str(model))
    assert same_weights(network, original())
    assert not network.training
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_the_small_autoencoder_is_read_as_such(tmp_path: Path) -> None:
    tiny_taesd().save_pretrained(tmp_path / "vae")
    assert same_weights(loading.load_vae(str(tmp_path)), tiny_taesd())


def test_a_clip_run_has_a_text_encoder(run: Path) -> None:
    encoder, tokenizer = loading.load_text_encoder(str(run))
    ids = torch.tensor([tokenizer("A dog.", padding="max_length")["input_ids"]])
    with torch.no_grad():
        expected = tiny_clip().text_model(ids)[0]
        assert torch.equal(encoder(ids)[0], expected)


def test_weights_stored_in_half_the_bytes_are_float32_in_memory_unless_asked(tmp_path: Path) -> None:
    tiny_unet().to(torch.bfloat16).save_pretrained(tmp_path / "unet")
    assert loading.load_unet(str(tmp_path)).dtype == torch.float32
    assert loading.load_unet(str(tmp_path), torch.bfloat16).dtype == torch.bfloat16


def test_the_only_variant_is_read_and_the_plain_weights_come_first(tmp_path: Path) -> None:
    tiny_unet(seed=1).save_pretrained(tmp_path / "unet", variant="fp16")
    assert same_weights(loading.load_unet(str(tmp_path)), tiny_unet(seed=1))
    tiny_unet(seed=2).save_pretrained(tmp_path / "unet")
    assert same_weights(loading.load_unet(str(tmp_path)), tiny_unet(seed=2))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_comes_back_with_its_settings(tmp_path: Path, name: str) -> None:
    tiny_scheduler(name).save_pretrained(tmp_path / "scheduler")
    loaded = loading.load_scheduler(str(tmp_path))
    assert type(loaded) is type(tiny_scheduler(name))
    for setting, value in SCHEDULERS[name][1].items():
        assert loaded.config[setting] == value


# ---- damage


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    weights = load_file(file)
    del weights["decoder.conv_in.bias"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks the weight decoder\.conv_in\.bias"):
        loading.load_vae(str(tmp_path))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"VAE in .* can't be read"):
        loading.load_vae(str(tmp_path))


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae", safe_serialization=False)
    with pytest.raises(ModelError, match="only as a pickle"):
        loading.load_vae(str(tmp_path))


@pytest.mark.parametrize("name", ["EvilScheduler", "torch", "DiffusionPipeline", None, "UNet2DConditionModel"])
def test_only_schedulers_of_diffusers_are_loaded(tmp_path: Path, name: str | None) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ModelError, match="not one of Diffusers'"):
        loading.load_scheduler(str(tmp_path))


def test_the_libraries_say_nothing_and_speak_again_afterwards(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = (diffusers_logging, transformers_logging)
    before = [log.get_verbosity() for log in logs]
    capfd.readouterr()
    loading.load_text_encoder(str(model))
    assert capfd.readouterr() == ("", "")
    with loading.quiet():
        for log in logs:
            log.get_logger(log.__name__).warning("noise")
    assert capfd.readouterr() == ("", "")
    assert [log.get_verbosity() for log in logs] == before
