"""Drawings that begin with a picture are those of Diffusers' pipelines, and what a mask keeps stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

from libraries import load_with_libraries
from limner.generation.engine import denoise, draw, encode_prompts, generators, initial_noise, turned
from limner.generation.jobs import make_jobs
from limner.generation.model import Model
from limner.generation.sources import Source, picture_of, read_mask, read_picture
from tiny import SCHEDULERS, tiny_model, tiny_taesd

NAMES = [name for name in SCHEDULERS if name != "flow-match"]  # which StableDiffusionPipeline can't use
DETERMINISTIC = [name for name in NAMES if name not in {"ddpm", "euler-ancestral", "lcm"}]
SIDE, PROMPT, SEED, STEPS = 16, "A brown dog on the beach.", 3, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model folder for each scheduler, one with a VAE without variance, a photograph and a mask."""
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        tiny_model(root / name, name)
    tiny_model(root / "taesd", "dpm", vae=tiny_taesd())
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(root / "photo.png")
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    mask.save(root / "mask.png")
    return root


def ours(root: Path, name: str, **settings: Any) -> np.ndarray:
    """What Limner's loop draws, (H, W, 3) in [0, 1], before it becomes bytes."""
    from limner.generation.canvas import Sketch

    painter = load_with_libraries(root / name).painter
    sketch = Sketch.of(read_picture(root / "photo.png"), settings.get("mask"), settings["strength"], (SIDE, SIDE))
    if settings.get("composite") is False:
        sketch = replace_composite(sketch)
    negative, states = encode_prompts(painter.text_encoder, painter.tokenizer, ["", PROMPT]).chunk(2)
    pixels = draw(
        painter.unet,
        painter.scheduler,
        painter.vae,
        states,
        seeds=[SEED],
        shape=(4, 8, 8),
        steps=STEPS,
        guidance=4.0,
        negative_states=negative,
        sketch=sketch,
    )
    return ((pixels[0] / 2 + 0.5).clamp(0, 1)).permute(1, 2, 0).numpy()


def replace_composite(sketch: Any) -> Any:
    """The sketch with what Diffusers returns, which does not put the photograph's own pixels back."""
    object.__setattr__(sketch, "composite", lambda pixels: pixels)
    return sketch


def theirs(pipeline: Any, **settings: Any) -> np.ndarray:
    """What a pipeline of Diffusers draws, (H, W, 3) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(SEED)],
        output_type="np",
        **settings,
    )
    picture: np.ndarray = drawn.images[0]
    return picture


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", [*NAMES, "taesd"])
def test_image_to_image_is_that_of_diffusers(root: Path, name: str, strength: float) -> None:
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(root / name)
    wanted = theirs(pipeline, image=Image.open(root / "photo.png"), strength=strength)
    assert wanted.std() > 0.02
    assert np.abs(ours(root, name, strength=strength) - wanted).max() < 1e-5


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_inpainting_is_that_of_diffusers(root: Path, name: str, strength: float) -> None:
    """Their pipeline draws random numbers for a masked picture that its U-Net never sees, so noise of the scheduler's
    own would be other noise."""
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(root / name)
    photo, mask = Image.open(root / "photo.png"), Image.open(root / "mask.png")
    wanted = theirs(pipeline, image=photo, mask_image=mask, strength=strength, height=SIDE, width=SIDE)
    found = ours(root, name, strength=strength, mask=read_mask(root / "mask.png"), composite=False)
    assert np.abs(found - wanted).max() < 1e-5


def drawn(root: Path, **settings: Any) -> np.ndarray:
    """A picture of the model `dpm-flow`, (H, W, 3) uint8."""
    model = Model.load(str(root / "dpm-flow"), "cpu")
    return np.asarray(model(PROMPT, steps=4, image=root / "photo.png", **settings).images[0])


def test_what_a_mask_keeps_stays_to_the_byte(root: Path) -> None:
    photo, picture = np.asarray(Image.open(root / "photo.png")), drawn(root, mask=root / "mask.png")
    assert (picture[:, SIDE // 2 :] == photo[:, SIDE // 2 :]).all()
    assert (picture[:, : SIDE // 2] != photo[:, : SIDE // 2]).any(axis=2).mean() > 0.9


def test_a_grey_mask_mixes(root: Path, tmp_path: Path) -> None:
    Image.new("L", (SIDE, SIDE), 51).save(tmp_path / "grey.png")  # below a half, so its latents are all kept
    photo = np.asarray(Image.open(root / "photo.png")).astype(float)
    Image.new("L", (SIDE, SIDE), 0).save(tmp_path / "black.png")
    assert (drawn(root, mask=tmp_path / "black.png") == photo).all()
    assert 0 < np.abs(drawn(root, mask=tmp_path / "grey.png") - photo).mean() < 0.21 * 255


def test_strength_decides_how_much_is_left_of_the_picture(root: Path) -> None:
    photo = np.asarray(Image.open(root / "photo.png")).astype(float)
    one, most = drawn(root, strength=0.25), drawn(root, strength=1.0)
    assert not np.array_equal(one, most)
    assert np.array_equal(drawn(root), drawn(root, strength=0.6))
    assert photo.std() > 5


def test_a_picture_does_not_depend_on_those_beside_it(root: Path) -> None:
    model = Model.load(str(root / "euler-ancestral"), "cpu")
    settings: dict[str, Any] = {"steps": 4, "image": root / "photo.png", "mask": root / "mask.png", "strength": 0.75}
    together = model(PROMPT, n=3, seed=5, **settings).images
    assert together[2].tobytes() == model(PROMPT, seed=7, **settings).images[0].tobytes()
    jobs = make_jobs(model.spec, [PROMPT], n=2, seed=6, steps=4, image=read_picture(root / "photo.png"))
    shape = model.painter._draw(jobs, None, None)  # in one batch, as a GPU would
    apart = [model.painter._draw([job], None, None)[0] for job in jobs]
    assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1 for a, b in zip(shape, apart))


@pytest.mark.parametrize(
    ("photo", "size"),
    [
        ((16, 16), (16, 16)),
        ((600, 600), (16, 16)),
        ((400, 100), (32, 8)),
        ((100, 400), (8, 32)),
        ((9000, 1), (1518, 2)),
    ],
)
def test_a_drawing_has_the_shape_of_its_picture_and_the_pixels_of_the_model(
    root: Path, photo: tuple[int, int], size: tuple[int, int]
) -> None:
    spec = Model.load(str(root / "ddim"), "cpu").spec
    source = Source("x", "0", Image.new("RGB", photo))
    job = make_jobs(spec, [PROMPT], image=source)[0]
    assert (job.width, job.height) == size
    assert make_jobs(spec, [PROMPT], image=source, size="24x32")[0].width == 24


def test_steps_that_are_told_are_those_taken(root: Path) -> None:
    model, told = Model.load(str(root / "pndm"), "cpu"), list[int]()
    job = make_jobs(model.spec, [PROMPT], steps=10, image=read_picture(root / "photo.png"), strength=0.3)[0]
    list(model.draw([job], on_step=told.append))
    assert sum(told) == job.steps_taken == 3


# ---- variations


def test_turning_noise_keeps_its_length_and_its_ends() -> None:
    one, other = initial_noise([1, 2], (4, 64, 64))
    for share in (0.0, 0.25, 0.5, 1.0):
        assert turned(one, other, share).std() == pytest.approx(1, abs=0.02)
    assert torch.allclose(turned(one, other, 0), one, atol=1e-6)
    assert torch.allclose(turned(one, other, 1), other, atol=1e-6)
    assert torch.allclose(turned(one, one, 0.3), one, atol=1e-6)
    assert turned(one, -one, 0.3).isfinite().all()

    def angle(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).acos())

    assert angle(one, turned(one, other, 0.3)) == pytest.approx(0.3 * angle(one, other), abs=0.01)


def test_variations_lie_around_a_seed(root: Path) -> None:
    model = Model.load(str(root / "euler-ancestral"), "cpu")
    plain = model(PROMPT, seed=7, steps=3).images[0]
    assert model(PROMPT, seed=7, steps=3, variation="9:0").images[0].tobytes() == plain.tobytes()
    several = model(PROMPT, n=2, seed=7, steps=3, variation="8:0.2")
    assert [p.record["seed"] for p in several.pictures] == [7, 7]
    assert [p.record["variation"] for p in several.pictures] == [{"seed": s, "strength": 0.2} for s in (8, 9)]
    alone = model(PROMPT, seed=7, steps=3, variation="9:0.2").images[0]
    assert several.images[1].tobytes() == alone.tobytes() != several.images[0].tobytes()


def test_noise_of_the_scheduler_s_own_is_the_seed_s_in_every_variation(root: Path) -> None:
    source = generators([7])[0]
    initial_noise([source], (4, 8, 8))
    assert not torch.equal(initial_noise([source], (4, 8, 8)), initial_noise([7], (4, 8, 8)))


# ---- previews


def test_previews_are_linear_in_latents_and_like_the_decoder(root: Path) -> None:
    from limner.generation.preview import Preview
    from limner.models import vae as vaes

    vae = Model.load(str(root / "ddim"), "cpu").painter.vae
    preview = Preview(vae)
    constant = torch.tensor([[0.5, -1.0, 0.2, 1.0]])[:, :, None, None].expand(1, 4, 8, 8)
    with torch.no_grad():
        wanted = vaes.decode(vae, constant).clamp(-1, 1).mean(dim=(2, 3))
    assert preview(constant).mean(dim=(2, 3)).sub(wanted).abs().max() < 0.15
    both = preview(torch.cat([constant, -constant]))
    assert torch.allclose(both.mean(dim=0), preview(0 * constant)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "dpm-flow", "unipc", "euler", "pndm"])
def test_previews_come_each_step_and_change_nothing(root: Path, name: str) -> None:
    model, shown = Model.load(str(root / name), "cpu"), list[tuple[str, Image.Image]]()
    jobs = make_jobs(model.spec, [PROMPT, "A cat."], steps=5, seed=2)
    pictures = list(model.draw(jobs, on_preview=lambda job, image: shown.append((job.prompt, image()))))
    each = 5 + (name == "pndm")  # which takes a timestep more than steps
    assert [prompt for prompt, _ in shown] == [PROMPT] * each + ["A cat."] * each
    assert {image.size for _, image in shown} == {(SIDE, SIDE)}
    assert [p.image.tobytes() for p in pictures] == [p.image.tobytes() for p in model.draw(jobs)]


@pytest.mark.parametrize("name", ["ddim", "dpm-flow", "unipc", "unipc-flow", "euler", "dpm"])
def test_the_last_estimate_is_the_result(root: Path, name: str) -> None:
    """Where the last step ends at data, as a first-order step does there, what the U-Net sees is where it lands."""
    painter, seen = load_with_libraries(root / name).painter, list[torch.Tensor]()
    states = encode_prompts(painter.text_encoder, painter.tokenizer, [PROMPT])
    noise = initial_noise([2], (4, 8, 8))
    latents = denoise(painter.unet, painter.scheduler, noise, states, steps=8, guidance=1, on_x0=seen.append)
    apart = [float((x0 - latents).norm() / latents.norm()) for x0 in seen]
    assert apart[-1] < 0.02
    assert apart[0] > apart[-1]


def test_a_source_is_known_by_its_bytes(root: Path) -> None:
    data = (root / "photo.png").read_bytes()
    assert picture_of(data, "a") == replace(read_picture(root / "photo.png"), ref="a")
