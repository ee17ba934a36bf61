"""What a model folder says about itself, and the settings that fit it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limner.errors import ConfigError, ModelError
from limner.generation.jobs import Spec, count_parameters, make_jobs, read_spec, warn_of_sizes
from tiny import tiny_model, tiny_taesd, tiny_text_encoder, tiny_unet, tiny_vae


def edited(folder: Path, copy: Path, file: str, **changes: Any) -> Path:
    """A copy of a model folder with entries of one of its JSON files changed; None removes one."""
    shutil.copytree(folder, copy)
    values = {**json.loads((copy / file).read_text()), **changes} if (copy / file).exists() else changes
    (copy / file).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return copy


def spec(factor: int = 8) -> Spec:
    """A model of 512x512 pixels."""
    return Spec("m", Path("m"), "StableDiffusionPipeline", (), True, 25, 7.5, (512, 512), factor)


def test_a_folder_without_defaults_has_those_of_stable_diffusion(folder: Path) -> None:
    found = read_spec(str(folder))
    assert (found.own_loop, found.steps, found.guidance, found.size, found.factor) == (True, 25, 7.5, (16, 16), 2)


def test_the_manifest_names_defaults_and_the_user_overrules_them(folder: Path, tmp_path: Path) -> None:
    copy = edited(folder, tmp_path / "m", "manifest.json", defaults={"steps": 4, "guidance": 1.0})
    found = read_spec(str(copy))
    assert (found.steps, found.guidance) == (4, 1.0)
    job = make_jobs(found, ["A dog."], steps=9)[0]
    assert (job.steps, job.guidance, job.width, job.height) == (9, 1.0, 16, 16)


@pytest.mark.parametrize(
    "defaults",
    [{"steps": "many", "guidance": 1}, {"steps": 4}, {"steps": 0, "guidance": 1}, [], 3, {"steps": 4, "guidance": 0}],
)
def test_defaults_that_make_no_sense_are_named(folder: Path, tmp_path: Path, defaults: Any) -> None:
    copy = edited(folder, tmp_path / "m", "manifest.json", defaults=defaults)
    with pytest.raises(ModelError, match=r"manifest\.json can't be used"):
        read_spec(str(copy))


def test_a_manifest_without_defaults_is_no_obstacle(folder: Path, tmp_path: Path) -> None:
    assert read_spec(str(edited(folder, tmp_path / "m", "manifest.json", parents={}))).steps == 25


def test_the_size_may_be_a_rectangle(tmp_path: Path) -> None:
    found = read_spec(str(tiny_model(tmp_path, unet=tiny_unet(sample_size=[8, 16]), vae=tiny_taesd())))
    assert (found.size, found.factor) == ((32, 16), 2)  # width, height; Diffusers writes height first


@pytest.mark.parametrize(
    ("size", "sides"),
    [("512", (512, 512)), (512, (512, 512)), ("768x512", (768, 512)), (" 64X128 ", (64, 128)), ("64×8", (64, 8))],
)
def test_sizes_are_a_side_or_two(size: str | int, sides: tuple[int, int]) -> None:
    job = make_jobs(spec(), ["A dog."], size=size)[0]
    assert (job.width, job.height) == sides


@pytest.mark.parametrize("size", ["", "big", "0", "-8", "8x", "x8", "8x8x8", "8.0", "9000", "8x99999999999", "٨", 0])
def test_sizes_that_are_none_are_refused(size: str | int) -> None:
    with pytest.raises(ConfigError, match="size"):
        make_jobs(spec(), ["A dog."], size=size)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [("100", "96x96 and 104x104"), ("100x128", "96x128 and 104x128"), ("5", "8x8")],
)
def test_a_size_that_does_not_fit_names_the_nearest_that_do(size: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"not divisible by 8.* {nearest}\.$"):
        make_jobs(spec(), ["A dog."], size=size)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 64))
def test_the_sizes_that_a_refusal_names_fit(width: int, height: int, factor: int) -> None:
    try:
        job = make_jobs(spec(factor), ["A dog."], size=f"{width}x{height}")[0]
        assert (job.width, job.height) == (width, height)
        assert width % factor == height % factor == 0
    except ConfigError as error:
        for named in str(error).rpartition(": ")[2].rstrip(".").split(" and "):
            make_jobs(spec(factor), ["A dog."], size=named)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"n": 0}, "n must"),
        ({"n": 10**9}, "1000000000 pictures, and 100000 can be drawn at a time"),
        ({"seed": -1}, "seed must"),
        ({"seed": 2**63}, "seed must"),
        ({"seed": 2**63 - 1, "n": 2}, "seed must"),
        ({"variation": f"{2**63 - 1}:0.2", "n": 2}, "variation"),
        ({"steps": 0}, "steps must"),
        ({"steps": -4}, "steps must"),
        ({"steps": 1001}, "steps must"),
        ({"guidance": 0.5}, "guidance must"),
        ({"guidance": float("nan")}, "guidance must"),
        ({"guidance": float("inf")}, "guidance must"),
        ({"negative": "\udce4"}, "negative prompt"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_jobs(spec(), ["A dog."], **settings)


def test_a_size_other_than_trained_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_sizes(spec(), [job for size in (512, 64, "64x8", 64) for job in make_jobs(spec(), ["A dog."], size=size)])
    assert caplog.messages == ["m was trained at 512x512 pixels; pictures of 64x64, 64x8 may be worse."]
    warn_of_sizes(spec(), make_jobs(spec(), ["A dog.", "A cat."]))
    assert len(caplog.messages) == 1


def test_the_last_seeds_are_drawn() -> None:
    assert [job.seed for job in make_jobs(spec(), ["A dog."], seed=2**63 - 2, n=2)] == [2**63 - 2, 2**63 - 1]
    around = make_jobs(spec(), ["A dog."], seed=2**63 - 1, n=2, variation=f"{2**63 - 2}:0.2")
    assert [job.variation and job.variation.seed for job in around] == [2**63 - 2, 2**63 - 1]


def test_each_prompt_has_its_seeds() -> None:
    jobs = make_jobs(spec(), [" A dog. ", "A cat."], n=2, seed=7)
    assert [(job.prompt, job.seed) for job in jobs] == [("A dog.", 7), ("A dog.", 8), ("A cat.", 7), ("A cat.", 8)]


def test_parameters_are_counted_without_loading(folder: Path) -> None:
    parts = {"text_encoder": tiny_text_encoder(), "unet": tiny_unet(), "vae": tiny_vae()}
    assert count_parameters(read_spec(str(folder))) == {
        name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()
    }


def test_weights_that_are_no_safetensors_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    for content in (b"", b"nonsense" * 9, b"\xff" * 64):
        (tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="can't be read"):
            count_parameters(read_spec(str(tmp_path / "m")))
