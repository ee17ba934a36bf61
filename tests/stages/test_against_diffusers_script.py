"""What Diffusers' `train_text_to_image.py` reads and computes is what Limner reads and computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import load_file
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from limner.config import TrainUnetConfig
from limner.data.dataset import read_split
from limner.data.pictures import read_picture
from limner.stages import train_unet
from limner.stages.train_unet import TrainUnet
from trainings import config


def test_the_script_sees_the_same_pictures_and_captions(data: Path, tmp_path: Path) -> None:
    """With `--train_data_dir data/train`, and with `--caption_column captions` for all of the captions."""
    read = load_dataset("imagefolder", data_files={"train": str(data / "train" / "**")}, cache_dir=str(tmp_path))
    assert read["train"].column_names[0] == "image"
    theirs = [(row["text"], row["captions"], row["image"].convert("RGB").tobytes()) for row in read["train"]]
    records = read_split(data, "train")
    ours = [(one.captions[0], list(one.captions), read_picture(one.path).tobytes()) for one in records]
    assert sorted(theirs) == sorted(ours)
    assert len(ours) > 0


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_the_loss_is_the_scripts(latents: Path, tmp_path: Path, objective: str) -> None:
    run = train_unet.run(config(TrainUnetConfig, latents, tmp_path / "r", objective=objective, images=8))
    task = TrainUnet(config(TrainUnetConfig, latents, tmp_path / "s", model=str(run)))
    (batch,) = task.stream.batches(0, 8, 8)

    unet = UNet2DConditionModel.from_pretrained(run / "model", subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(run / "model", subfolder="scheduler")
    x0, noise, timesteps = task.encoded.latents(batch), batch["noise"], (batch["t"] * 1000).ceil().long() - 1
    noised = scheduler.add_noise(x0, noise, timesteps)
    wanted = noise if objective == "eps" else scheduler.get_velocity(x0, noise, timesteps)
    with torch.no_grad():
        theirs = mse_loss(unet(noised, timesteps, batch["states"]).sample.float(), wanted.float(), reduction="mean")
        assert_close(task.loss(task.network, batch)[0], theirs)


def test_plain_diffusers_reads_the_weight_average(unet: Path) -> None:
    read = UNet2DConditionModel.from_pretrained(unet / "model", subfolder="unet")
    saved = load_file(unet / "checkpoints" / "000000032" / "state.safetensors")
    for number, parameter in enumerate(read.parameters()):
        assert torch.equal(parameter, saved[f"average.{number}"])
