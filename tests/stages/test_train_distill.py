"""`limner train distill`: a student lands in one step where its guided teacher lands in several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from limner import load
from limner.artifacts import read_json
from limner.config import AssembleConfig, TrainDistillConfig, TrainUnetConfig
from limner.diffusion import schedulers
from limner.errors import ConfigError, ModelError
from limner.models import loading
from limner.stages import assemble, train_distill, train_unet
from limner.stages.train_distill import TrainDistill
from tiny import tiny_scheduler, tiny_unet
from trainings import config


@pytest.fixture(scope="module")
def teacher(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `train unet` that has learned something."""
    settings = {"images": 640, "lr": 5e-3, "ema_halflife": 50, "validate_every": 640}
    return train_unet.run(config(TrainUnetConfig, latents, tmp_path_factory.mktemp("teacher") / "run", **settings))


@pytest.fixture(scope="module")
def student(teacher: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to draw in two steps."""
    settings = {"steps": 2, "substeps": 3, "images": 640, "lr": 5e-3, "validate_every": 128, "ema_halflife": 50}
    return train_distill.run(
        config(TrainDistillConfig, latents, tmp_path_factory.mktemp("distill") / "run", model=str(teacher), **settings)
    )


def lossless(latents: Path, out: Path, model: Path, **settings: object) -> float:
    """The loss of a student that has learned nothing yet."""
    task = TrainDistill(config(TrainDistillConfig, latents, out, model=str(model), **settings))
    with torch.no_grad():
        return task.loss(task.network, next(task.stream.batches(0, 8, 8)))[0].item()


@pytest.mark.parametrize("objective", ["flow", "eps", "v"])
def test_a_copy_is_a_perfect_student_of_single_steps_without_guidance(
    latents: Path, tmp_path: Path, objective: str
) -> None:
    teacher = train_unet.run(config(TrainUnetConfig, latents, tmp_path / "t", objective=objective, images=8))
    for number, (settings, wanted) in enumerate(
        (
            ({"substeps": 1, "guidance": (1.0, 1.0)}, True),
            ({"substeps": 1, "guidance": (3.0, 3.0)}, False),
            ({"substeps": 3, "guidance": (1.0, 1.0)}, False),
        )
    ):
        found = lossless(latents, tmp_path / str(number), teacher, **settings)
        assert found < 1e-9 if wanted else found > 1e-8, (settings, found)


def test_a_student_learns_what_its_teacher_draws(student: Path) -> None:
    events = [json.loads(line) for line in (student / "events.jsonl").read_text().splitlines()]
    losses = [event["validation/loss"] for event in events if "validation/loss" in event]
    assert len(losses) == 5
    assert losses[-1] < 0.5 * losses[0]
    assert (student / "samples" / "000000640" / "drawn.png").is_file()


def test_a_student_is_not_trained_as_if_it_were_none(student: Path, latents: Path, tmp_path: Path) -> None:
    asked = config(TrainUnetConfig, latents, tmp_path / "r", model=str(student))
    with pytest.raises(ConfigError, match=f"{student} is a student of limner train distill; train its teacher"):
        train_unet.run(asked)
    assert not (tmp_path / "r").exists()


def test_a_student_may_teach(student: Path, latents: Path, tmp_path: Path) -> None:
    assert lossless(latents, tmp_path / "a", student, steps=2, substeps=1) < 1e-9, "whatever the guidance"
    assert lossless(latents, tmp_path / "b", student, steps=1, substeps=2) > 1e-8


def test_a_model_with_a_student_draws_in_plain_diffusers_with_guidance_as_a_setting(
    student: Path, clip: Path, vae: Path, tmp_path: Path
) -> None:
    made = assemble.run(
        AssembleConfig(clip=str(clip), vae=str(vae), unet=str(student), out=tmp_path / "m", steps=2, grid=False)
    )
    pipeline = StableDiffusionPipeline.from_pretrained(made)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config["time_cond_proj_dim"] == 256
    model = load(str(made), precision="fp32")
    drawn = {}
    for guidance in (2.0, 6.0):
        ours = model("A dog.", seed=3, guidance=guidance).images[0]
        theirs = pipeline(
            "A dog.", num_inference_steps=2, guidance_scale=guidance, generator=torch.Generator().manual_seed(3)
        ).images[0]
        assert ours.tobytes() == theirs.tobytes()
        drawn[guidance] = ours.tobytes()
    assert drawn[2.0] != drawn[6.0]


def test_the_result_says_what_text_encoder_it_reads(student: Path, teacher: Path) -> None:
    assert read_json(student / "manifest.json")["text"] == read_json(teacher / "manifest.json")["text"]
    assert schedulers.objective_of(loading.load_scheduler(str(student))) == "flow"


# ---- mistakes


@pytest.mark.parametrize("guidance", [(0.5, 2.0), (4.0, 2.0)])
def test_guidance_goes_from_least_to_greatest(guidance: tuple[float, float], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give two numbers in that order"):
        config(TrainDistillConfig, tmp_path, tmp_path / "r", model="builtin", guidance=guidance)


@pytest.mark.parametrize("steps", [0, 9])
def test_few_steps_are_one_to_eight(steps: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps"):
        config(TrainDistillConfig, tmp_path, tmp_path / "r", model="builtin", steps=steps)


def test_a_teacher_with_another_text_encoder_of_the_same_shape_is_refused(
    teacher: Path, latents: Path, clip: Path, vae: Path, tmp_path: Path
) -> None:
    parts = {"clip": str(clip), "vae": str(vae), "unet": str(teacher)}
    model = assemble.run(AssembleConfig(**parts, out=tmp_path / "m", grid=False))
    settings = config(TrainDistillConfig, latents, tmp_path / "r", model=str(model))
    TrainDistill(settings)
    file = model / "text_encoder" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    TrainDistill(settings)
    save_file({name: 1.1 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"reads those of another text encoder; encode with --clip {model}"):
        TrainDistill(settings)


def test_a_teacher_that_reads_other_states_is_refused(latents: Path, tmp_path: Path) -> None:
    tiny_unet(cross_attention_dim=24).save_pretrained(tmp_path / "m" / "unet")
    tiny_scheduler("dpm-flow").save_pretrained(tmp_path / "m" / "scheduler")
    with pytest.raises(ModelError, match="wants token states of width 24"):
        train_distill.run(config(TrainDistillConfig, latents, tmp_path / "r", model=str(tmp_path / "m")))
    assert not (tmp_path / "r").exists()
