"""A model with config files as early versions of Diffusers wrote them goes all ways that others go."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from limner.artifacts import is_finished
from limner.config import EncodeConfig, Engine, TrainDistillConfig, TrainLoraConfig, TrainUnetConfig
from limner.generation.model import Model
from limner.stages import assemble, encode, train_distill, train_unet
from tiny import tiny_model
from trainings import config

# What Diffusers 0.6 wrote; all that came later is left to defaults
SHAPE = {"_class_name", "_diffusers_version", "act_fn", "block_out_channels", "down_block_types", "in_channels"}
SHAPE |= {"layers_per_block", "norm_num_groups", "out_channels", "sample_size", "up_block_types"}
WRITTEN = {
    "vae/config.json": SHAPE | {"latent_channels"},
    "unet/config.json": SHAPE
    | {"attention_head_dim", "center_input_sample", "cross_attention_dim", "downsample_padding", "flip_sin_to_cos"}
    | {"freq_shift", "mid_block_scale_factor", "norm_eps"},
    "scheduler/scheduler_config.json": {"_class_name", "_diffusers_version", "beta_end", "beta_schedule", "beta_start"}
    | {"clip_sample", "num_train_timesteps", "set_alpha_to_one", "skip_prk_steps", "steps_offset", "trained_betas"},
}


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with such files."""
    folder = tiny_model(tmp_path_factory.mktemp("early") / "model", "pndm")
    for name, written in WRITTEN.items():
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in known.items() if key in written}))
    return folder


@pytest.mark.parametrize("engine", get_args(Engine))
def test_it_draws_what_it_draws_in_diffusers(early: Path, engine: Engine) -> None:
    if engine == "openvino" and find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    settings = {"num_inference_steps": 6, "guidance_scale": 4.0, "height": 16, "width": 16}
    theirs = StableDiffusionPipeline.from_pretrained(early)(
        "A dog.", generator=torch.Generator().manual_seed(3), **settings
    ).images[0]
    model = Model.load(str(early), "cpu", precision="fp32", engine=engine)
    [ours] = model("A dog.", seed=3, steps=6, guidance=4.0).images
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_it_is_trained_and_taught(early: Path, data: Path, tmp_path: Path) -> None:
    ref = str(early)
    latents = encode.run(config(EncodeConfig, data, tmp_path / "latents", vae=ref, clip=ref))
    unet = train_unet.run(config(TrainUnetConfig, latents, tmp_path / "unet", model=ref))
    lora = train_unet.run(config(TrainLoraConfig, latents, tmp_path / "lora", model=ref))
    student = train_distill.run(config(TrainDistillConfig, latents, tmp_path / "student", model=ref))
    assert all(map(is_finished, (unet, lora, student)))
    asked = {"clip": ref, "vae": ref, "unet": str(unet), "out": tmp_path / "model", "steps": 4, "guidance": 2.0}
    whole = assemble.run(assemble.AssembleConfig(**asked))
    one, other = (
        np.asarray(Model.load(str(folder), "cpu", loras=loras)("A dog.", steps=2).images[0])
        for folder, loras in ((whole, ()), (early, (str(lora),)))
    )
    assert one.shape == other.shape == (16, 16, 3)
