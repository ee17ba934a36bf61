"""`limner assemble`: the parts become a folder that plain Diffusers loads and draws with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

import limner as package
from limner.artifacts import read_json, sha256, sha256_folder
from limner.config import AssembleConfig
from limner.errors import ConfigError, ModelError, UserError
from limner.models import loading
from limner.settings import resolve
from limner.stages import assemble
from tiny import tiny_clip, tiny_model, tiny_tokenizer
from trainings import SIDE

PROMPT = "A red circle on a blue ground."


@pytest.fixture(scope="module")
def parts(clip: Path, vae: Path, unet: Path) -> dict[str, str]:
    """The runs that a model is joined from."""
    return {"clip": str(clip), "vae": str(vae), "unet": str(unet)}


@pytest.fixture(scope="module")
def model(parts: dict[str, str], stages: Path) -> Path:
    """A model of those parts."""
    return assemble.run(settings(parts, stages / "model"))


def settings(parts: dict[str, str], out: Path, **values: Any) -> AssembleConfig:
    """The configuration of an assembly."""
    return resolve(AssembleConfig, {"out": out, **parts, **values})


def refused(config: AssembleConfig, error: type[UserError], match: str) -> None:
    """An assembly is refused in one sentence, also by its plan, and nothing is written."""
    before = sha256_folder(config.out.parent)
    for call in (assemble.run, assemble.plan):
        with pytest.raises(error, match=match) as caught:
            call(config)
        assert "\n" not in str(caught.value)
    assert sha256_folder(config.out.parent) == before


def draw(pipeline: Any) -> np.ndarray[Any, Any]:
    """A picture of that pipeline, as bytes."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    image = pipeline(PROMPT, num_inference_steps=3, guidance_scale=4.0, generator=generator).images[0]
    assert image.size == (SIDE, SIDE)
    return np.asarray(image).astype(int)


# ---- the folder


def test_the_folder_is_laid_out_as_diffusers_has_it(model: Path) -> None:
    folders = {"text_encoder", "tokenizer", "vae", "unet", "scheduler", "clip"}
    files = {"model_index.json", "manifest.json", "MODEL_CARD.md"}
    assert {p.name for p in model.iterdir()} == folders | files
    assert not [p for p in model.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    index = read_json(model / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_plain_diffusers_loads_it_and_draws(
    parts: dict[str, str], stages: Path, precision: str, dtype: torch.dtype | None
) -> None:
    out = assemble.run(settings(parts, stages / f"model-{precision}", precision=precision))
    stored = {t.dtype for file in out.rglob("*.safetensors") for t in load_file(file).values()}
    assert stored == {assemble.DTYPES[precision]}
    pipeline = DiffusionPipeline.from_pretrained(out, torch_dtype=dtype)
    picture = draw(pipeline)
    assert picture.std() > 0
    exact = draw(DiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32))
    assert np.abs(picture - exact).mean() < 12


def test_limner_and_diffusers_draw_the_same(model: Path) -> None:
    ours = package.load(str(model))(PROMPT, seed=7, steps=3, guidance=4.0).images[0]
    theirs = draw(DiffusionPipeline.from_pretrained(model))
    assert np.abs(np.asarray(ours).astype(int) - theirs).max() <= 1


def test_it_loads_where_limner_is_not_installed(model: Path, tmp_path: Path) -> None:
    script = f"""
import sys
sys.modules["limner"] = None  # as if it were not installed
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(model)!r})
pipeline("A dog.", num_inference_steps=1).images[0].save({str(tmp_path / "dog.png")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert (tmp_path / "dog.png").stat().st_size > 0


@torch.no_grad()
def test_weights_are_those_of_the_parts(model: Path, parts: dict[str, str]) -> None:
    for name, file in (("vae", "diffusion_pytorch_model"), ("unet", "diffusion_pytorch_model"), ("clip", "model")):
        one = load_file(Path(parts[name]) / "model" / name / f"{file}.safetensors")
        other = load_file(model / name / f"{file}.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    clip, reader = CLIPModel.from_pretrained(model / "clip"), CLIPTokenizer.from_pretrained(model / "tokenizer")
    text_encoder, _ = loading.load_text_encoder(str(model))
    ids = reader(PROMPT, padding="max_length", return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 77)
    assert torch.equal(clip.text_model(ids).last_hidden_state, text_encoder(ids).last_hidden_state)


# ---- manifest and card


def test_manifest_and_card_say_what_it_is_made_of(model: Path, parts: dict[str, str]) -> None:
    manifest = read_json(model / "manifest.json")
    assert manifest["parents"] == {role: loading.identity(ref, role) for role, ref in parts.items()}
    assert manifest["defaults"] == {"steps": 25, "guidance": 7.5}
    assert manifest["precision"] == "fp32"
    assert set(manifest["trainings"]) == {"clip", "vae", "unet"}
    for role, training in manifest["trainings"].items():
        run = read_json(Path(parts[role]) / "manifest.json")
        assert training == {name: run[name] for name in ("images", "seed", "validation", "hardware")}
    card = (model / "MODEL_CARD.md").read_text()
    assert all(sha256(file) in card for file in model.rglob("*.safetensors"))
    assert all(f"| {name} | 32 | 0 |" in card for name in ("CLIP", "VAE", "U-Net"))


def test_defaults_and_own_words_are_taken(parts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Shapes\n\nFür Tests.\n")
    own = settings(parts, tmp_path / "m", steps=9, guidance=3, card=tmp_path / "card.md")
    out = assemble.run(own)
    assert (out / "MODEL_CARD.md").read_text().startswith("# Shapes\n\nFür Tests.\n")
    assert "num_inference_steps=9, guidance_scale=3)" in (out / "MODEL_CARD.md").read_text()
    assert package.load(str(out))(PROMPT, seed=7).images[0].size == (SIDE, SIDE)


def test_parts_of_other_models_have_no_training(parts: dict[str, str], tmp_path: Path) -> None:
    """A Stable Diffusion folder has a text encoder alone, and no manifest."""
    whole = str(tiny_model(tmp_path / "sd", "dpm-flow"))
    out = assemble.run(settings({"clip": whole, "vae": whole, "unet": whole}, tmp_path / "m"))
    assert read_json(out / "manifest.json")["trainings"] == {}
    assert not (out / "clip").exists()
    assert "## Trainings" not in (out / "MODEL_CARD.md").read_text()
    assert draw(DiffusionPipeline.from_pretrained(out)).std() > 0


# ---- the same again


def test_again_there_is_nothing_to_do(model: Path, parts: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    before = sha256_folder(model)
    stamps = {p: p.stat().st_mtime_ns for p in model.rglob("*")}
    assemble.run(settings(parts, model))
    assert "Nothing to do" in capsys.readouterr().out
    assert sha256_folder(model) == before
    assert {p: p.stat().st_mtime_ns for p in model.rglob("*")} == stamps


def test_a_model_is_joined_from_a_model(model: Path, tmp_path: Path) -> None:
    out = assemble.run(settings(dict.fromkeys(("clip", "vae", "unet"), str(model)), tmp_path / "m"))
    for name in ("vae", "unet", "text_encoder", "clip"):
        assert sha256_folder(out / name, "*.safetensors") == sha256_folder(model / name, "*.safetensors")


def test_a_plan_writes_nothing(parts: dict[str, str], tmp_path: Path) -> None:
    plan = assemble.plan(settings(parts, tmp_path / "m"))
    assert plan["draws"] == f"{SIDE}x{SIDE} pixels"
    assert list(tmp_path.iterdir()) == []


# ---- mistakes


def test_parts_that_do_not_fit_are_named(parts: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "sd"
    tiny_model(other)
    match = "the text encoder's width 16 against the U-Net's cross_attention_dim 32"
    refused(settings({**parts, "unet": str(other)}, tmp_path / "m"), ModelError, match)
    clip = tmp_path / "clip"
    tiny_clip().save_pretrained(clip)
    tiny_tokenizer(clip)
    file = clip / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["vocab_size"] = 601
    torch.manual_seed(0)
    CLIPModel(CLIPModel.config_class.from_dict(config)).save_pretrained(clip)
    match = "width 32 .*, the tokenizer's entries 600 against the text encoder's vocab_size 601; take parts"
    refused(settings({**parts, "clip": str(clip)}, tmp_path / "m"), ModelError, match)


@pytest.mark.parametrize("role", ["clip", "vae", "unet"])
def test_missing_parts_are_named(parts: dict[str, str], tmp_path: Path, role: str) -> None:
    refused(settings({**parts, role: str(tmp_path / "none")}, tmp_path / "m"), ModelError, "There is no model folder")
    (tmp_path / "empty").mkdir()
    refused(settings({**parts, role: str(tmp_path / "empty")}, tmp_path / "m"), ModelError, "has no")
    other = {"clip": "vae", "vae": "unet", "unet": "clip"}[role]
    refused(settings({**parts, role: parts[other]}, tmp_path / "m"), ModelError, "has no")


def test_what_is_there_is_left_alone(parts: dict[str, str], model: Path, tmp_path: Path) -> None:
    refused(settings(parts, model, steps=9), ConfigError, "holds something else; delete it")
    refused(settings(parts, model, precision="bf16"), ConfigError, "holds something else")
    refused(settings(parts, Path(parts["clip"])), ConfigError, "holds something else")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"a")
    refused(settings(parts, tmp_path / "photos"), ConfigError, "holds something else")
    refused(settings(parts, tmp_path / "photos" / "a.jpg"), ConfigError, "is a file; choose another --out")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "not UTF-8"])
def test_a_card_that_cannot_be_read_is_named(parts: dict[str, str], tmp_path: Path, content: bytes | None) -> None:
    card = tmp_path / "card.md"
    if content is not None:
        card.write_bytes(content)
    with pytest.raises(ConfigError, match=r"The card .*card\.md can't be read"):
        assemble.run(settings(parts, tmp_path / "m", card=card))
    assert not (tmp_path / "m").exists()
