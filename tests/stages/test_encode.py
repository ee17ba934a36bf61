"""`limner encode`: moments and token states are those of the encoders, and work that was done is kept."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from kills import kill, writes_of
from limner.artifacts import identity, read_json, sha256_folder
from limner.config import EncodeConfig, PrepareConfig
from limner.data.dataset import read_split
from limner.data.latents import ENCODED, LatentCache
from limner.data.pictures import load_pixels, to_pixels
from limner.errors import ConfigError, DataError, ModelError, RunError, UserError
from limner.models import loading
from limner.models import vae as vaes
from limner.settings import resolve
from limner.stages import encode, prepare
from limner.training.encoded import Encoded
from photos import encoded, put
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
    for split in ENCODED:
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
    for split in ENCODED:
        cache, records = LatentCache(latents, split), read_split(data, split)
        assert cache.captions == [list(record.captions) for record in records]
        for index, record in enumerate(records):
            for number, caption in enumerate(record.captions):
                wanted = tower(input_ids=model.tokenize([caption])).last_hidden_state[0]
                assert_close(cache.states(index, number), wanted, rtol=2e-3, atol=5e-3)
        empty = tower(input_ids=model.tokenize([""])).last_hidden_state[0]
        assert_close(cache.states(0, None), empty, rtol=2e-3, atol=5e-3)


def test_a_map_that_was_trained_with_the_clip_is_applied(
    settings: EncodeConfig, latents: Path, clip: Path, tmp_path: Path
) -> None:
    """For `assemble` makes it a part of the U-Net, which must have learned to read what the map makes of states."""
    adapted = tmp_path / "clip"
    shutil.copytree(clip, adapted)
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    (adapted / "model" / "adapter").mkdir()
    save_file({"weight": weight}, adapted / "model" / "adapter" / "adapter.safetensors")
    run = encode.run(changed(settings, clip=str(adapted)))
    assert read_json(run / "manifest.json")["parents"]["adapter"] == identity(adapted / "model" / "adapter")
    plain, mapped = LatentCache(latents, "train"), LatentCache(run, "train")
    for number in (0, None):
        assert_close(mapped.states(1, number), plain.states(1, number) @ weight.T, rtol=5e-3, atol=3e-2)

    caption = LatentCache(run, "val").captions[0][0]
    prompt, same, *_ = Encoded(run, [caption]).prompt_states  # what a training draws meanwhile is read likewise
    assert_close(prompt, same, rtol=5e-3, atol=3e-2)
    save_file({"weight": -weight}, adapted / "model" / "adapter" / "adapter.safetensors")
    with pytest.raises(DataError, match=f"is stale, as the adapter of {adapted} changed since"):
        Encoded(run, [])


def test_test_pictures_are_not_encoded(latents: Path) -> None:
    assert {p.name for p in (latents / "cache").iterdir()} == {"train", "val", "empty.npy"}


def test_the_manifest_says_what_it_was_made_from(latents: Path, data: Path, clip: Path, vae: Path) -> None:
    manifest = read_json(latents / "manifest.json")
    assert set(manifest["parents"]) == {"data/train", "data/val", "vae", "clip"}
    assert manifest["parents"]["vae"] == vaes.encoder_identity(str(vae))
    assert manifest["parents"]["clip"] == loading.identity(str(clip), "clip")
    assert manifest["pictures"] == {split: len(read_split(data, split)) for split in ("train", "val")}


def test_views_batches_and_plan(settings: EncodeConfig, latents: Path) -> None:
    plan = encode.plan(settings)
    assert not settings.out.exists()
    assert plan["train"].endswith("pictures of 16x16 in 2 views, latents of 8x8")
    one = encode.run(changed(settings, flips=False, batch_size=5))
    cache, other = LatentCache(one, "train"), LatentCache(latents, "train")
    assert cache.views == 1
    for index in range(len(cache)):
        assert_close(cache.view(index, 0), other.view(index, 0), rtol=2e-3, atol=2e-3)


def test_an_autoencoder_tiny_will_do(settings: EncodeConfig, tmp_path: Path) -> None:
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    run = encode.run(changed(settings, vae=str(tmp_path / "taesd")))
    assert LatentCache(run, "train").view(0, 0)[4:].max() == vaes.LOGVAR[0]


def test_captions_that_are_not_read_whole_are_counted(
    settings: EncodeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, count = tmp_path / "data", 0
    shutil.copytree(settings.data, other)
    for split in ENCODED:
        file = other / split / "metadata.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[0]["captions"][0] = "A dog runs through the snow. " * 40
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        count += sum(len(row["captions"]) for row in rows)
    encode.run(changed(settings, data=other))
    assert f"2 of {count} captions are longer than the 77 tokens that are read of each" in caplog.text


# ---- views, buckets and masks

SHAPES = {(60, 36): (20, 12), (36, 60): (12, 20), (48, 48): (16, 16)}
"""Width and height of what is stored of a picture of that width and height."""


@torch.no_grad()
def test_each_picture_is_stored_in_the_shape_nearest_to_its_own(bucketed: Path, photographs: Path, vae: Path) -> None:
    model = loading.load_vae(str(vae))
    for split in ENCODED:
        cache, records = LatentCache(bucketed, split), read_split(photographs, split)
        assert len(cache) == len(records)
        assert len(set(cache.bucket.tolist())) == 3
        for index, record in enumerate(records):
            picture = Image.open(record.path)
            width, height = SHAPES[picture.size]
            pixels = to_pixels(picture, (0, 0, *picture.size), (height, width))[None]
            for view, shown in enumerate((pixels, pixels.flip(-1))):
                assert_close(cache.view(index, view), vaes.encode(model, shown)[0], rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_views_after_the_first_are_random_parts_each_with_its_mirror_image(
    bucketed: Path, photographs: Path, vae: Path
) -> None:
    train, model = LatentCache(bucketed, "train"), loading.load_vae(str(vae))
    assert train.views == 6
    assert LatentCache(bucketed, "val").views == 2, "val is judged by the centre alone"
    own = EncodeConfig.model_validate(read_json(bucketed / "config.json"))
    parts = set()
    for bucket in encode._buckets(own, "train", read_split(photographs, "train")):
        indices = list(bucket.records)
        pixels = encode._cut(own, bucket, indices, to_pixels, bucket.size)  # (N, 6, 3, H, W)
        assert torch.equal(pixels[:, 1::2], pixels[:, ::2].flip(-1))
        assert torch.equal(encode._cut(own, bucket, indices[2:3], to_pixels, bucket.size), pixels[2:3])
        for index, views in zip(indices, pixels, strict=True):
            parts |= {tuple(view.flatten().tolist()) for view in views[::2]}
            for view, shown in enumerate(views):
                assert_close(train.view(index, view), vaes.encode(model, shown[None])[0], rtol=2e-3, atol=2e-3)
    assert len(parts) > 0.9 * 3 * len(train), "a few crops are of nearly the whole picture"


def test_masks_are_stored_where_a_picture_has_one(bucketed: Path, photographs: Path) -> None:
    cache, records = LatentCache(bucketed, "train"), read_split(photographs, "train")
    assert [p.name for p in (bucketed / "cache" / "train").glob("masks*")] == ["masks-16x16.npy"]
    for index, record in enumerate(records):
        for view in range(6):
            mask = cache.mask(index, view)
            if Image.open(record.path).mode == "RGB":
                assert mask is None
            else:
                number = int(record.path.stem)
                assert mask is not None
                assert torch.equal(mask, torch.full((1, 8, 8), float(number % 2)))


def test_masks_lie_where_what_they_hide_lies(settings: EncodeConfig, tmp_path: Path) -> None:
    """A picture whose left half is black and see-through: mask and pixels agree in every view."""
    image = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (32, 0, 64, 48))
    names = ("train/0", "train/1", "val/2")
    source = put(tmp_path / "source", {f"{name}.png": encoded(image, "PNG") for name in names})
    put(source, {f"{name}.txt": b"Half a picture." for name in names})
    values = {"kind": "imagefolder", "source": source, "out": tmp_path / "data", "workers": 1, "keep_alpha": True}
    data = prepare.run(resolve(PrepareConfig, values))
    tiny_taesd().save_pretrained(tmp_path / "vae")
    own = changed(settings, data=data, views=4, vae=str(tmp_path / "vae"))
    cache = LatentCache(encode.run(own), "train")
    bucket = encode._buckets(own, "train", read_split(data, "train"))[0]
    pixels = encode._cut(own, bucket, range(2), to_pixels, (16, 16))  # (2, 8, 3, 16, 16)
    assert torch.equal(pixels[0, 0], pixels[1, 0])
    assert not torch.equal(pixels[0, 2:], pixels[1, 2:]), "equal pictures are cut differently"
    for index in range(2):
        for view in range(8):
            mask = cache.mask(index, view)
            assert mask is not None
            wanted = torch.nn.functional.avg_pool2d(pixels[index, view, :1] * 0.5 + 0.5, 2)
            assert_close(mask, wanted, rtol=0, atol=0.3)
            assert (mask - wanted).abs().mean() < 0.06


def test_plan_tells_buckets_views_masks_and_disk(settings: EncodeConfig, bucketed: Path, photographs: Path) -> None:
    plan = encode.plan(changed(settings, data=photographs, buckets=True, bucket_step=4, views=3))
    counts = torch.bincount(torch.from_numpy(LatentCache(bucketed, "train").bucket)).tolist()
    assert plan["train"].split("; ")[0] == f"{counts[0]} pictures of 20x12 in 6 views, latents of 10x6"
    assert f"{counts[1]} pictures of 16x16 in 6 views, latents of 8x8, {counts[1]} with a mask" in plan["train"]
    assert "in 2 views" in plan["val"]
    size = sum(p.stat().st_size for p in (bucketed / "cache").rglob("*.npy"))
    assert float(plan["disk"].split()[0]) == pytest.approx(size / 1e6, abs=0.6)


def test_a_rerun_writes_the_same_bits_and_another_seed_others(
    settings: EncodeConfig, bucketed: Path, photographs: Path, tmp_path: Path
) -> None:
    own = changed(settings, data=photographs, buckets=True, bucket_step=4, views=3)
    assert sha256_folder(encode.run(own) / "cache") == sha256_folder(bucketed / "cache")
    other = encode.run(changed(own, seed=1, out=tmp_path / "other"))
    cache, first = LatentCache(other, "train"), LatentCache(bucketed, "train")
    for index in range(len(cache)):
        same = [torch.equal(cache.view(index, view), first.view(index, view)) for view in range(6)]
        assert same == [True, True, False, False, False, False]


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


def test_memory_that_is_too_small_is_said(settings: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 1 bytes.")

    monkeypatch.setattr("limner.models.vae.encode", full)
    with pytest.raises(ConfigError, match="The memory is too small for 32 pictures of this size at once; choose a sm"):
        encode.run(settings)


def test_other_settings_are_named(settings: EncodeConfig, latents: Path) -> None:
    with pytest.raises(RunError, match=r"other settings \(buckets, flips, size, views\)"):
        encode.run(changed(settings, out=latents, flips=False, size=32, views=2, buckets=True))


def test_a_cache_of_an_older_version_is_finished(
    settings: EncodeConfig, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(latents, tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    old = {name: read_json(file)[name] for name in ("data", "vae", "clip", "size", "flips", "out")}
    file.write_text(json.dumps(old))
    encode.run(changed(settings, out=tmp_path / "old"))
    assert "Nothing to do" in capsys.readouterr().out


def test_wrong_inputs_are_refused(settings: EncodeConfig, clip: Path, vae: Path, tmp_path: Path) -> None:
    refused(changed(settings, data=tmp_path / "missing"), DataError, "not a dataset folder")
    refused(changed(settings, data=clip), DataError, "not a dataset folder")
    refused(changed(settings, vae=str(clip)), ModelError, "has no VAE")
    refused(changed(settings, clip=str(vae)), ModelError, "has no CLIP|has no text encoder")
    refused(changed(settings, vae=str(tmp_path / "missing")), ModelError, "There is no model folder")
    refused(changed(settings, size=17), ConfigError, "--size 17 is not divisible by the VAE's factor 2")


def test_what_does_not_fit_together_is_refused(
    settings: EncodeConfig, uncaptioned: Path, no_val: Path, data: Path, tmp_path: Path
) -> None:
    odd = changed(settings, size=18, buckets=True, bucket_step=9)
    refused(odd, ConfigError, "bucket_step 9 is not divisible by the VAE's factor 2; choose a multiple")
    refused(changed(settings, data=uncaptioned), DataError, "no caption in its train split")
    refused(changed(settings, data=no_val), DataError, "no pictures in its val split; prepare it with --val-share")
    with pytest.raises(ConfigError, match="size 100 is not divisible by bucket_step 32"):
        config(EncodeConfig, data, tmp_path / "r", vae="v", clip="c", size=100, buckets=True)
    assert config(EncodeConfig, data, tmp_path / "r", vae="v", clip="c", size=100).size == 100


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
