"""A model draws the same picture for the same prompt and seed, whatever else it draws with it."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL.Image import Image
from torch import Tensor

import limner
from limner.config import Precision
from limner.errors import ConfigError, ModelError
from limner.generation import catalogue, painters, pipeline, provenance
from limner.generation.engine import to_images
from limner.generation.jobs import make_jobs
from limner.generation.model import Model
from tiny import CAPTIONS, tiny_model, tiny_unet

PROMPTS = ["A dog.", "a " * 80 + "dog on a beach", CAPTIONS[0], "A cat, " * 60]


def same(one: Image, other: Image) -> bool:
    """Whether two pictures agree in every bit."""
    return one.size == other.size and one.tobytes() == other.tobytes()


# ---- the same picture


@pytest.mark.parametrize("scheduler", ["dpm-flow", "euler-ancestral"])  # one draws noise of its own in each step
@pytest.mark.parametrize(("guidance", "precision"), [(1.0, "fp32"), (5.0, "fp32"), (5.0, "bf16")])
def test_a_picture_does_not_depend_on_those_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str, guidance: float, precision: Precision
) -> None:
    model = Model.load(str(tiny_model(tmp_path, scheduler)), "cpu", precision=precision)
    pixels: list[Tensor] = []  # before they are rounded to bytes
    monkeypatch.setattr(painters, "to_images", lambda drawn: pixels.extend(drawn) or to_images(drawn))

    def draw(prompts: list[str], seed: int, n: int, batch_size: int) -> list[Tensor]:
        pixels.clear()
        model(prompts, n=n, seed=seed, steps=3, guidance=guidance, negative="snow", batch_size=batch_size)
        return list(pixels)  # (3, H, W) each

    together = draw(PROMPTS, 5, 8, 8)
    assert len(together) == 32
    alone = [draw([prompt], 5 + i, 1, 1)[0] for prompt in PROMPTS for i in range(8)]
    assert all(map(torch.equal, together, alone))
    assert all(map(torch.equal, together[::8], reversed(draw(PROMPTS[::-1], 5, 1, 3))))


def test_a_batch_draws_the_same_pictures_but_for_rounding(model: Model) -> None:
    """On a GPU pictures share a batch; here the networks run as they would there."""
    jobs = make_jobs(model.spec, [CAPTIONS[0], CAPTIONS[1], "A dog."], steps=4)
    batch = model.painter._draw(jobs, None)
    for image, job in zip(batch, jobs):
        alone = model.painter._draw([job], None)[0]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(alone)).max() <= 1


def test_seeds_and_prompts_tell_pictures_apart(model: Model) -> None:
    drawn = model(["A dog.", "A cat."], n=2, steps=2).images
    for words in (76, 200):  # which differ behind the 77th token only, in the second and the third piece
        drawn += model([f"{'a ' * (words - 1)}{last}" for last in ("dog", "cat")], steps=2).images
    assert len({image.tobytes() for image in drawn}) == 8


def test_a_model_loaded_again_draws_the_same(folder: Path, model: Model) -> None:
    one, other = model("A dog.", seed=9), limner.load(str(folder), device="cpu", precision="fp32")("A dog.", seed=9)
    assert same(one.images[0], other.images[0])
    assert one.pictures[0].record == other.pictures[0].record


# ---- what a call gives


def test_images_have_the_size_that_was_asked_for(model: Model) -> None:
    assert model("A dog.", steps=1).images[0].size == (16, 16)
    assert model("A dog.", steps=1, size="24x34").images[0].size == (24, 34)


def test_steps_are_told_for_every_picture(model: Model) -> None:
    told: list[int] = []
    model("A dog.", n=2, steps=3, on_step=told.append)
    assert told == [1] * 6


def test_pictures_save_with_their_origin(model: Model, tmp_path: Path) -> None:
    drawn = model("A dog.", n=2, seed=3, steps=2, guidance=2, negative="snow")
    paths = drawn.save(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["a-dog-3.png", "a-dog-4.png"]
    record = provenance.read(paths[1])
    assert record == drawn.pictures[1].record
    expected = {"prompt": "A dog.", "negative": "snow", "seed": 4, "steps": 2, "guidance": 2, "width": 16, "height": 16}
    assert expected.items() <= record.items()
    assert record["device"]["type"] == "cpu"
    assert record["versions"]["torch"] == torch.__version__
    assert record["model"]["pipeline"] == "StableDiffusionPipeline"
    assert record["model"]["scheduler"]["_class_name"] == "DDIMScheduler"


def test_the_record_names_every_weight_file_by_its_hash(model: Model, folder: Path) -> None:
    weights = model.facts["weights"]
    assert set(weights) == {p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors")}
    for name, digest in weights.items():
        assert digest == limner.artifacts.sha256(folder / name)


def test_weights_that_lie_there_twice_count_once(folder: Path, tmp_path: Path) -> None:
    both = shutil.copytree(folder, tmp_path / "both")
    plain = both / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(plain, plain.with_suffix(".fp16.safetensors"))
    assert Model.load(str(both), "cpu").weights == Model.load(str(folder), "cpu").weights
    one, two = (catalogue.look_into("one", each) for each in (folder, both))
    assert (two.parameters, two.bytes) == (one.parameters, one.bytes)
    assert catalogue.facts(two)["parts"] == catalogue.facts(one)["parts"]
    plain.rename(plain.with_suffix(".fp32.safetensors"))  # of two variants it is the first by name
    [unet] = [name for name in Model.load(str(both), "cpu").weights if name.startswith("unet/")]
    assert unet == "unet/diffusion_pytorch_model.fp16.safetensors"


def test_the_record_says_with_which_scheduler_and_words(model: Model) -> None:
    drawn = model("A {dog|cat}.", n=4, steps=2, scheduler="DPM++ 2M Karras", guidance_rescale=0.5)
    for picture in drawn.pictures:
        record = picture.record
        assert (record["scheduler"], record["guidance_rescale"]) == ("dpmpp_2m_karras", 0.5)
        assert record["prompt"] in {"A dog.", "A cat."}
        assert record["template"] == "A {dog|cat}."
        assert record["model"]["scheduler"]["_class_name"] == "DPMSolverMultistepScheduler"
        assert record["model"]["scheduler"]["use_karras_sigmas"] is True
        again = model(record["prompt"], steps=2, seed=record["seed"], scheduler="dpmpp_2m_karras", guidance_rescale=0.5)
        assert same(again.images[0], picture.image)
        assert again.pictures[0].record == {**record, "template": None}
    plain = model("A dog.", steps=2).pictures[0].record
    assert (plain["scheduler"], plain["model"]["scheduler"]["_class_name"]) == (None, "DDIMScheduler")
    assert len({record["prompt"] for record in (picture.record for picture in drawn.pictures)}) == 2


# ---- refusals


def test_settings_are_refused_in_a_sentence(model: Model) -> None:
    for settings in (
        {"size": 15},
        {"steps": -1},
        {"guidance": 0},
        {"n": 0},
        {"prompts": ""},
        {"prompts": ["A.", " "]},
        {"scheduler": "x"},
    ):
        with pytest.raises(ConfigError):
            model(**{"prompts": "A dog.", **settings})
    with pytest.raises(ConfigError, match="n must be 1 or more, not -1"):
        model("A dog.", n=-1, best_of=2)


@pytest.mark.parametrize("device", ["cuda:77", "abacus", "", "meta"])
def test_a_device_that_is_not_there_is_named(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="There is no device"):
        Model.load(str(folder), device)


def test_numbers_beyond_all_bounds_are_not_drawn(tmp_path: Path) -> None:
    unet = tiny_unet()
    torch.nn.init.constant_(unet.conv_out.bias, 1e38)
    model = Model.load(str(tiny_model(tmp_path, unet=unet)), "cpu")
    with pytest.raises(ModelError, match="beyond all bounds"):
        model("A dog.")


def test_memory_that_is_too_small_is_said(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator refuses for real; only the size asked of it is not a picture's."""
    monkeypatch.setattr(model.painter.vae, "decode", lambda *_, **__: torch.empty(2**59))
    with pytest.raises(ConfigError, match="memory is too small"):
        model("A dog.", steps=1)


def test_memory_that_is_too_small_for_the_model_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limner.models.plain.load_file", lambda _: torch.empty(2**59))
    with pytest.raises(ConfigError, match="memory is too small for this model; draw with --low-memory"):
        Model.load(str(folder), "cpu")


# ---- any other pipeline of Diffusers


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that our own loop does not draw with."""
    folder = tiny_model(tmp_path_factory.mktemp("lcm"), "lcm", unet=tiny_unet(time_cond_proj_dim=16))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "LatentConsistencyModelPipeline"}))
    return folder


def test_another_pipeline_draws_through_diffusers(other: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from diffusers import LatentConsistencyModelPipeline

    model = Model.load(str(other), "cpu", precision="fp32")
    told: list[int] = []
    drawn = model(["A dog.", "A cat."], n=2, seed=3, on_step=told.append)
    assert capfd.readouterr().err == ""
    theirs = LatentConsistencyModelPipeline.from_pretrained(other)
    image = theirs("A cat.", generator=torch.Generator().manual_seed(4), height=16, width=16).images[0]
    assert same(drawn.images[3], image)
    assert same(drawn.images[3], model("A cat.", seed=4).images[0])
    assert told == [4] * 4, "the pipeline's own number of steps"
    record = drawn.pictures[3].record
    assert (record["steps"], record["guidance"], record["width"]) == (4, 8.5, 16)
    assert len(record["model"]["weights"]) == 3


def test_another_pipeline_takes_schedulers_and_alternatives(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPAGPipeline"}))
    model = Model.load(str(folder), "cpu", precision="fp32")
    with pytest.raises(
        ConfigError, match=r"The negative prompt 'a a .* is longer than StableDiffusionPAGPipeline reads"
    ):
        model("A dog.", negative="a " * 80, size=16)
    plain = model("A (brown) dog.", steps=3, size=16).pictures[0]
    drawn = model("A (brown) {dog|dog}.", steps=3, size=16, scheduler="euler").pictures[0]
    assert not same(plain.image, drawn.image)
    assert drawn.record["prompt"] == plain.record["prompt"] == "A (brown) dog."
    assert drawn.record["model"]["scheduler"]["_class_name"] == "EulerDiscreteScheduler"
    assert same(plain.image, model("A (brown) dog.", steps=3, size=16).images[0]), "the model's own scheduler again"
    with pytest.raises(ConfigError, match="There is no scheduler 'x'"):
        model("A dog.", scheduler="x")
    escaped = model(r"A \(brown\) dog.", negative=r"\[snow\]", steps=3, size=16).pictures[0]
    assert same(escaped.image, model("A (brown) dog.", negative="[snow]", steps=3, size=16).images[0])
    assert escaped.record["prompt"] == r"A \(brown\) dog."


def test_another_pipeline_refuses_what_it_would_drop(other: Path) -> None:
    model = Model.load(str(other), "cpu", precision="fp32")
    with pytest.raises(ConfigError, match="no negative setting"):
        model("A dog.", negative="snow")
    with pytest.raises(ConfigError, match="longer than LatentConsistencyModelPipeline reads"):
        model("a " * 80)
    with pytest.raises(ConfigError, match="can't draw this"):
        model("A dog.", size=20)
    with pytest.raises(ConfigError, match="no guidance_rescale setting"):
        model("A dog.", guidance_rescale=0.5)
    for prompt in ("A (dog:1.3).", "A dog BREAK a cat"):
        with pytest.raises(ConfigError, match="reads prompts as they are; leave weights"):
            model(prompt)
    with pytest.raises(ConfigError, match="draws with its own scheduler alone"):
        model("A dog.", scheduler="euler")
    with pytest.raises(ConfigError, match="in memory as a whole on a CPU"):
        Model.load(str(other), "cpu", low_memory=True)


def test_a_pipeline_without_steps_and_sizes_is_given_none(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as unCLIP, which has steps for each of its stages, and one size."""
    model = Model.load(str(other), "cpu", precision="fp32")
    takes = model.painter.takes
    left = {name: taken for name, taken in takes.items() if name not in {"num_inference_steps", "width", "height"}}
    monkeypatch.setattr(model.painter, "takes", left)
    [picture] = model("A dog.").pictures
    assert picture.record["steps"] is None
    for setting in ({"steps": 3}, {"size": 16}):
        with pytest.raises(ConfigError, match=f"has no {next(iter(setting))} setting"):
            model("A dog.", **setting)


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("AudioLDM2Pipeline", False),
        ("StableAudioPipeline", False),
        ("WanPipeline", False),
        ("TextToVideoZeroPipeline", False),
        ("CogVideoXPipeline", False),
        ("StableDiffusionXLPipeline", True),
        ("FluxPipeline", True),
        ("PixArtSigmaPipeline", True),
        ("StableCascadeCombinedPipeline", True),
    ],
)
def test_pipelines_that_make_sounds_and_films_are_told_apart(name: str, pictures: bool) -> None:
    takes = inspect.signature(getattr(diffusers, name).__call__).parameters
    assert pipeline.makes_pictures(takes) == pictures


def test_a_pipeline_without_guidance_is_given_none(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as Stable Cascade, which has one scale for each of its stages."""
    model = Model.load(str(other), "cpu", precision="fp32")
    takes = {name: taken for name, taken in model.painter.takes.items() if name != "guidance_scale"}
    monkeypatch.setattr(model.painter, "takes", takes)
    jobs = model.settle(make_jobs(model.spec, ["A dog."], steps=2))
    assert model.settle(jobs) == jobs
    [picture] = model.draw(jobs)
    assert picture.record["guidance"] is None
    assert "CFG scale" not in provenance.parameters(picture.record)
    assert provenance.read(picture.save(tmp_path)) == picture.record


def test_a_pipeline_that_draws_without_a_prompt_is_refused(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="needs more than a prompt or none"):
        Model.load(str(tmp_path), "cpu")
