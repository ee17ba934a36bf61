"""`limner encode`: moments and token states are those of the encoders, and work that was done is kept."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kills import kill, writes_of
from limner.artifacts import read_json, sha256_folder
from limner.config import EncodeConfig
from limner.data.dataset import read_split
from limner.data.latents import LatentCache
from limner.data.pictures import load_pixels
from limner.errors import ConfigError, DataError, ModelError, RunError, UserError
from limner.models import loading
from limner.models import vae as vaes
from limner.stages import encode
from tiny import tiny_clip, tiny_taesd, tiny_tokenizer
from trainings import SIDE, config


@pytest.fixture
def settings(data: Path, clip: Path, vae: Path, tmp_path: Path) -> EncodeConfig:
    """The configuration of an encoding that is yet to be run."""
    return config(EncodeConfig, data, tmp_path / "r", clip=str(clip), vae=str(vae))


def changed(settings: EncodeConfig, **values: Any) -> EncodeConfig:
    """The same configuration but for these values."""
    return settings.model_copy(update=values)


def refused(settings: EncodeConfig, error: type[UserError], match: str) -> None:
    """An encoding is refused in one sentence, also by its plan, and nothing is written."""
    for call in (encode.run, encode.plan):
        with pytest.raises(error, match=match) as caught:
            call(settings)
        assert "\n" not in str(caught.value)
    assert not settings.out.exists()


# ---- what is stored


@torch.no_grad()
def test_moments_are_those_of_the_vae(latents: Path, data: Path, vae: Path) -> None:
    model = loading.load_vae(str(vae))
    for split in encode.ENCODED:
        cache, records = LatentCache(latents, split), read_split(data, split)
        assert len(cache) == len(records) > 0
        assert cache.views == 2
        for index, record in enumerate(records):
            pixels = load_pixels(record.path, SIDE)[None]
            for view, shown in enumerate((pixels, pixels.flip(-1))):
                assert_close(cache.view(index, view), vaes.encode(model, shown)[0], rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_token_states_are_those_of_plain_transformers(latents: Path, data: Path, clip: Path) -> None:
    model = loading.load_clip(str(clip))
    tower = model.network.text_model
    for split in encode.ENCODED:
        cache, records = LatentCache(latents, split), read_split(data, split)
        assert cache.captions == [list(record.captions) for record in records]
        for index, record in enumerate(records):
            for number, caption in enumerate(record.captions):
                wanted = tower(input_ids=model.tokenize([caption])).last_hidden_state[0]
                assert_close(cache.states(index, number), wanted, rtol=2e-3, atol=5e-3)
        empty = tower(input_ids=model.tokenize([""])).last_hidden_state[0]
        assert_close(cache.states(0, None), empty, rtol=2e-3, atol=5e-3)


def test_test_pictures_are_not_encoded(latents: Path) -> None:
    assert {p.name for p in (latents / "cache").iterdir()} == {"train", "val", "empty.npy"}


def test_the_manifest_says_what_it_was_made_from(latents: Path, data: Path, clip: Path, vae: Path) -> None:
    manifest = read_json(latents / "manifest.json")
    assert set(manifest["parents"]) == {"data/train", "data/val", "vae", "clip"}
    assert manifest["parents"]["vae"] == loading.identity(str(vae), "vae")
    assert manifest["parents"]["clip"] == loading.identity(str(clip), "clip")
    assert manifest["pictures"] == {split: len(read_split(data, split)) for split in ("train", "val")}


def test_views_batches_and_plan(settings: EncodeConfig, latents: Path) -> None:
    plan = encode.plan(settings)
    assert not settings.out.exists()
    assert "in 2 views, latents of 8x8" in plan["pictures"]
    one = encode.run(changed(settings, flips=False, batch_size=5))
    cache, other = LatentCache(one, "train"), LatentCache(latents, "train")
    assert cache.views == 1
    for index in range(len(cache)):
        assert_close(cache.view(index, 0), other.view(index, 0), rtol=2e-3, atol=2e-3)


def test_an_autoencoder_tiny_will_do(settings: EncodeConfig, tmp_path: Path) -> None:
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    run = encode.run(changed(settings, vae=str(tmp_path / "taesd")))
    assert LatentCache(run, "train").view(0, 0)[4:].max() == vaes.LOGVAR[0]


def test_without_val_its_arrays_are_empty(settings: EncodeConfig, no_val: Path) -> None:
    run = encode.run(changed(settings, data=no_val))
    assert len(LatentCache(run, "val")) == 0
    assert "data/val" not in read_json(run / "manifest.json")["parents"]


# ---- the same again


def test_a_finished_run_is_left_as_it_is(
    latents: Path, data: Path, clip: Path, vae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sha256_folder(latents)
    encode.run(config(EncodeConfig, data, latents, clip=str(clip), vae=str(vae)))
    assert "Nothing to do" in capsys.readouterr().out
    assert sha256_folder(latents) == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL")
def test_killed_and_resumed_it_keeps_what_was_done(settings: EncodeConfig, latents: Path, tmp_path: Path) -> None:
    whole = changed(settings, out=tmp_path / "whole")
    count = writes_of(encode.run, whole)
    assert sha256_folder(whole.out / "cache") == sha256_folder(latents / "cache")
    kept = []
    for at_write in range(1, count + 1, 3):
        killed = changed(settings, out=tmp_path / f"killed-{at_write}")
        kill(encode.run, killed, at_write=at_write)
        done = {p: p.stat().st_mtime_ns for p in killed.out.rglob("*.npy")}
        encode.run(killed)
        assert {p: p.stat().st_mtime_ns for p in done} == done
        assert {n: h for n, h in sha256_folder(killed.out / "cache").items() if n.endswith("npy")} == {
            n: h for n, h in sha256_folder(latents / "cache").items() if n.endswith("npy")
        }
        kept.append(len(done))
    assert kept[0] == 0
    assert kept[-1] == 5


# ---- mistakes


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("role", ["vae", "clip"])
@pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL")
def test_an_encoder_that_changed_is_named(
    settings: EncodeConfig, vae: Path, clip: Path, tmp_path: Path, role: str, finished: bool
) -> None:
    """Half the cache from one encoder and half from another would be of no use."""
    shutil.copytree({"vae": vae, "clip": clip}[role], tmp_path / "encoder")
    own = changed(settings, **{role: str(tmp_path / "encoder")})
    if finished:
        encode.run(own)
    else:
        kill(encode.run, own, at_write=8)
    before = sha256_folder(own.out)
    (file,) = (tmp_path / "encoder" / "model").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=f"other contents of {role} than"):
        encode.run(own)
    assert sha256_folder(own.out) == before


def test_a_dataset_that_changed_is_named(settings: EncodeConfig, tmp_path: Path) -> None:
    shutil.copytree(settings.data, tmp_path / "data")
    own = changed(settings, data=tmp_path / "data")
    encode.run(own)
    file = tmp_path / "data" / "train" / "metadata.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match="other contents of data/train than"):
        encode.run(own)


def test_other_settings_are_named(settings: EncodeConfig, latents: Path) -> None:
    with pytest.raises(RunError, match=r"other settings \(flips, size\)"):
        encode.run(changed(settings, out=latents, flips=False, size=32))


def test_wrong_inputs_are_refused(settings: EncodeConfig, clip: Path, vae: Path, tmp_path: Path) -> None:
    refused(changed(settings, data=tmp_path / "missing"), DataError, "not a dataset folder")
    refused(changed(settings, data=clip), DataError, "not a dataset folder")
    refused(changed(settings, vae=str(clip)), ModelError, "has no VAE")
    refused(changed(settings, clip=str(vae)), ModelError, "has no CLIP|has no text encoder")
    refused(changed(settings, vae=str(tmp_path / "missing")), ModelError, "There is no model folder")
    refused(changed(settings, size=17), ConfigError, "--size 17 is not divisible by the VAE's factor 2")


def test_a_folder_of_something_else_is_left_alone(settings: EncodeConfig) -> None:
    settings.out.mkdir()
    (settings.out / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not a run folder"):
        encode.run(settings)
    assert [p.name for p in settings.out.iterdir()] == ["notes.txt"]


def test_a_whole_model_folder_gives_both_encoders(settings: EncodeConfig, tmp_path: Path) -> None:
    tiny_taesd().save_pretrained(tmp_path / "model" / "vae")
    tiny_clip().text_model.save_pretrained(tmp_path / "model" / "text_encoder")
    tiny_tokenizer(tmp_path / "model" / "tokenizer")
    run = encode.run(changed(settings, vae=str(tmp_path / "model"), clip=str(tmp_path / "model")))
    assert LatentCache(run, "train").states(0, 0).shape == (77, 32)
