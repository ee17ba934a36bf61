"""recipes/more_latents.py: more latent channels, with what a VAE and a U-Net have learned kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from limner.config import EncodeConfig, TrainUnetConfig, TrainVaeConfig
from limner.models import loading
from limner.stages import encode, train_unet, train_vae
from tiny import tiny_model
from trainings import SIDE, config, script


def test_what_was_learned_is_kept_and_goes_on_in_more_channels(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "model")
    script(monkeypatch, "more_latents.py", "vae", "--model", model, "--channels", 6, "--out", tmp_path / "begun")
    old, new = (loading.load_vae(str(folder)).eval() for folder in (model, tmp_path / "begun"))
    with torch.no_grad():
        pixels = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
        before, after = old.encode(pixels).latent_dist, new.encode(pixels).latent_dist
        assert_close(after.mean[:, :4], before.mean)
        assert_close(after.logvar[:, :4], before.logvar)
        assert after.mean[:, 4:].std() > 0.01
        unheeded = torch.cat([before.mean, torch.zeros(2, 2, *before.mean.shape[2:])], dim=1)
        assert_close(new.decode(unheeded).sample, old.decode(before.mean).sample)
        assert (new.decode(after.mean).sample - new.decode(unheeded).sample).abs().max() > 1e-4

    vae = train_vae.run(config(TrainVaeConfig, data, tmp_path / "vae", model=str(tmp_path / "begun"), channels=None))
    given = ["--model", model, "--vae", vae, "--data", data, "--size", SIDE]
    script(monkeypatch, "more_latents.py", "unet", *given, "--out", tmp_path / "grown")
    unet, grown = (loading.load_unet(str(folder)).eval() for folder in (model, tmp_path / "grown"))
    latents, states = torch.randn(2, 6, 8, 8), torch.randn(2, 7, unet.config["cross_attention_dim"])
    with torch.no_grad():
        answers = [u(x, 5, states).sample for u, x in ((unet, latents[:, :4]), (grown, latents))]
    assert_close(answers[1][:, :4], answers[0])
    assert not answers[1][:, 4:].any()

    cache = encode.run(config(EncodeConfig, data, tmp_path / "latents", clip=str(model), vae=str(tmp_path / "grown")))
    train_unet.run(config(TrainUnetConfig, cache, tmp_path / "unet", model=str(tmp_path / "grown")))
    assert loading.load_unet(str(tmp_path / "unet")).conv_out.weight[4:].any(), "it answers for the new ones too"


def test_fewer_channels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model")
    with pytest.raises(SystemExit, match="more than the 4 that there are"):
        script(monkeypatch, "more_latents.py", "vae", "--model", model, "--channels", 4, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()
