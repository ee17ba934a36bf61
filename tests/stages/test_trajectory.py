"""The weight average of a checkpoint, put into a U-Net, is what the training would have saved there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from limner.config import EncodeConfig, TrainUnetConfig
from limner.errors import DataError, ModelError
from limner.evaluation import trajectory
from limner.models import loading
from limner.stages import encode, train_unet
from limner.training import checkpoints
from trainings import config


@pytest.fixture(scope="module")
def seen(data: Path, clip: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `encode` with features."""
    out = tmp_path_factory.mktemp("features") / "latents"
    return encode.run(config(EncodeConfig, data, out, clip=str(clip), vae=str(vae), features=str(clip)))


@pytest.mark.parametrize("way", ["aligned", "keys and values"])
def test_the_last_checkpoint_is_the_result_and_the_first_is_not(
    seen: Path, unet: Path, tmp_path: Path, way: str
) -> None:
    settings: dict[str, Any] = {"align_weight": 0.5}
    if way != "aligned":
        settings = {"model": str(unet), "tune": "cross_attention_kv"}
    run = train_unet.run(config(TrainUnetConfig, seen, tmp_path / "r", lr=0.01, **settings))
    found = trajectory.find(run)
    assert list(found) == [16, 32]
    wanted = loading.load_unet(str(run)).state_dict()
    same = []
    for checkpoint in found.values():
        network = loading.load_unet(str(run))
        with torch.no_grad():
            trained = [p for name, p in network.named_parameters() if way == "aligned" or ".attn2.to_k" in name]
            for weight in trained:
                weight.zero_()
        checkpoints.load_average(checkpoint, network)
        same.append(all(torch.equal(network.state_dict()[name], weight) for name, weight in wanted.items()))
    assert same == [False, True]


def test_encoders_that_changed_since_are_not_drawn_with(data: Path, clip: Path, vae: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(vae, tmp_path / "vae"))
    latents = encode.run(config(EncodeConfig, data, tmp_path / "latents", clip=str(clip), vae=str(own)))
    run = train_unet.run(config(TrainUnetConfig, latents, tmp_path / "r"))
    found = trajectory.find(run)
    assert set(trajectory.assemble(run, found, tmp_path / "out")) == set(found)
    file = next((own / "model" / "vae").glob("*.safetensors"))
    weights = load_file(file)
    save_file(weights | {"quant_conv.bias": weights["quant_conv.bias"] + 1}, file, {"format": "pt"})
    with pytest.raises(DataError, match=f"is stale, as the VAE {own} changed since"):
        trajectory.assemble(run, found, tmp_path / "out")


def test_a_damaged_checkpoint_is_named(unet: Path, tmp_path: Path) -> None:
    network = loading.load_unet(str(unet))
    (tmp_path / checkpoints.TENSORS).write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=r"can't be drawn with .*; delete it\."):
        checkpoints.load_average(tmp_path, network)
