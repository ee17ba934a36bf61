"""Representation alignment: `encode` stores what an image tower sees, and the middle block of a U-Net learns it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from limner.config import EncodeConfig, TrainLoraConfig, TrainUnetConfig
from limner.data.dataset import read_split
from limner.data.latents import LatentCache
from limner.data.pictures import load_pixels
from limner.errors import ConfigError, DataError
from limner.models import loading
from limner.models.representation import Aligned, misaligned
from limner.stages import encode, train_clip, train_unet
from limner.stages.train_unet import TrainUnet
from tiny import WIDTH, tiny_unet
from trainings import config


@pytest.fixture(scope="module")
def seen(data: Path, clip: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `encode` with features."""
    out = tmp_path_factory.mktemp("features") / "latents"
    return encode.run(config(EncodeConfig, data, out, clip=str(clip), vae=str(vae), features=str(clip), views=2))


@torch.no_grad()
def test_features_are_those_of_the_image_tower_for_each_view(seen: Path, data: Path, clip: Path) -> None:
    tower, cache = loading.load_clip(str(clip)), LatentCache(seen, "train")
    pixels = torch.stack([load_pixels(record.path, tower.size) for record in read_split(data, "train")])
    plain, mirrored = tower.patch_features(pixels), tower.patch_features(pixels.flip(-1))
    assert plain.shape[1:] == (16, 2, 2)
    for index in range(len(cache)):
        assert_close(cache.features(index, 0), plain[index], rtol=0, atol=2e-3)
        assert_close(cache.features(index, 1), mirrored[index], rtol=0, atol=2e-3)
    assert not torch.equal(cache.features(0, 0), cache.features(0, 2)), "another crop looks otherwise"


@torch.no_grad()
def test_patches_are_where_they_are_in_the_picture(clip: Path) -> None:
    tower = loading.load_clip(str(clip))
    vision = tower.network.vision_model
    vision.encoder.layers = torch.nn.ModuleList()  # what is left sees each patch alone
    pixels = torch.zeros(1, 3, 16, 16)
    changed = pixels.clone()
    changed[..., :8, 8:] = 1  # above, to the right
    moved = (tower.patch_features(changed) - tower.patch_features(pixels)).abs().amax(dim=1)[0] > 1e-4
    assert moved.tolist() == [[False, True], [False, False]]


def test_the_middle_block_comes_to_see_what_the_tower_sees(seen: Path, tmp_path: Path) -> None:
    settings = {"align_weight": 1.0, "images": 400, "lr": 3e-3, "log_every": 40, "validate_every": 400}
    run = train_unet.run(config(TrainUnetConfig, seen, tmp_path / "r", **settings))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    missed = [event["misaligned"] for event in events if "misaligned" in event]
    assert missed[0] > 0.7
    assert missed[-1] < 0.9 * missed[0]
    assert all(
        event["loss"] == pytest.approx(event["error"] + event["misaligned"]) for event in events if "error" in event
    )
    assert not [name for name in loading.load_unet(str(run)).state_dict() if "map" in name]


def test_the_map_is_at_the_middle_block_and_the_answer_is_the_unets(tmp_path: Path) -> None:
    unet = tiny_unet()
    aligned = Aligned(unet, 5, 3)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 77, WIDTH)
    answer, mapped = aligned(*inputs, return_dict=False)
    assert torch.equal(answer, unet(*inputs).sample)
    assert mapped.shape == (2, 5, 3, 3)
    mapped.sum().backward()
    assert any(p.grad is not None for p in unet.mid_block.parameters())
    assert all(p.grad is None for p in unet.up_blocks.parameters())
    assert not unet.mid_block._forward_hooks


def test_misalignment_is_one_minus_the_cosine_place_by_place() -> None:
    features = torch.randn(2, 3, 2, 2)
    assert_close(misaligned(3 * features, features), torch.zeros(2), rtol=0, atol=1e-6)
    assert_close(misaligned(-features, features), torch.full((2,), 2.0))
    half = features.clone()
    half[:, :, 0] *= -1
    assert_close(misaligned(half, features), torch.ones(2))


def test_examples_hold_features_only_where_they_are_asked_for(seen: Path, tmp_path: Path) -> None:
    plain = TrainUnet(config(TrainUnetConfig, seen, tmp_path / "r"))
    aligned = TrainUnet(config(TrainUnetConfig, seen, tmp_path / "r", align_weight=0.5))
    one, other = plain.stream[5], aligned.stream[5]
    assert set(other) - set(one) == {"features"}
    assert all(np.array_equal(one[name], other[name]) for name in one)
    views = [
        aligned.encoded.train.view(index, view) for index in range(len(aligned.encoded.train)) for view in range(4)
    ]
    (place,) = [k for k, view in enumerate(views) if torch.equal(view, other["moments"])]
    assert torch.equal(other["features"], aligned.encoded.train.features(place // 4, place % 4)), "of the same view"


# ---- mistakes


def test_without_features_there_is_nothing_to_align_with(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no features to align with; encode with --set features=CLIP"):
        train_unet.run(config(TrainUnetConfig, latents, tmp_path / "r", align_weight=0.5))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("cls", "settings"), [(TrainUnetConfig, {"tune": "attention"}), (TrainLoraConfig, {})])
def test_alignment_is_for_whole_unets(tmp_path: Path, cls: type[TrainUnetConfig], settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="align_weight is for training all of a U-Net"):
        config(cls, tmp_path, tmp_path / "r", model="builtin", align_weight=0.5, **settings)


def test_a_tower_that_changed_is_named(data: Path, vae: Path, clip: Path, tmp_path: Path) -> None:
    other = train_clip.run(config(train_clip.TrainClipConfig, data, tmp_path / "clip", seed=1))
    settings = {"clip": str(clip), "vae": str(vae), "features": str(other)}
    cache = encode.run(config(EncodeConfig, data, tmp_path / "latents", **settings))
    (weights,) = (other / "model" / "clip").glob("*.safetensors")
    weights.write_bytes((clip / "model" / "clip" / weights.name).read_bytes())
    with pytest.raises(DataError, match=f"is stale, as the CLIP {other} changed since"):
        train_unet.run(config(TrainUnetConfig, cache, tmp_path / "r"))
