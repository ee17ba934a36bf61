"""`limner assemble`: the parts become a folder that plain Diffusers loads and draws with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

import limner as package
from libraries import load_with_libraries
from limner.artifacts import identity, read_json, sha256, sha256_folder, write_json
from limner.config import AssembleConfig, TrainClipConfig
from limner.errors import ConfigError, ModelError, UserError
from limner.evaluation.mixing import mixed
from limner.evaluation.plots import grid
from limner.models import gate, loading
from limner.settings import resolve
from limner.stages import assemble, train_clip
from tiny import tiny_clip, tiny_model, tiny_scheduler, tiny_tokenizer, tiny_unet
from trainings import SIDE, config

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


def swap_tokens(folder: Path) -> None:
    """Give two entries of a tokenizer each other's numbers."""
    tokenizer = read_json(folder / "tokenizer.json")
    entries = tokenizer["model"]["vocab"]
    entries["a"], entries["b"] = entries["b"], entries["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


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
    ours = package.load(str(model), precision="fp32")(PROMPT, seed=7, steps=3, guidance=4.0).images[0]
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
    for file in model.rglob("*.json"):
        assert str(model.parent) not in file.read_text(), "where it was made is nobody's business"


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
    assert "| on test pictures | tuned |" in card
    assert "grid.png" not in card  # a new CLIP has no before


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


# ---- before and after tuning


STEPS = 2  # for a grid


def tuned(data: Path, clip: Path, out: Path, **values: Any) -> str:
    """A run of `train clip` that begins with another's result."""
    return str(train_clip.run(config(TrainClipConfig, data, out, model=str(clip), lr=1e-2, **values)))


@pytest.fixture(scope="module")
def plain(parts: dict[str, str], stages: Path) -> Path:
    """A model of the CLIP as it was before, drawn in few steps."""
    return assemble.run(settings(parts, stages / "assembled-plain", steps=STEPS))


def drawn_by(folder: Path) -> torch.Tensor:
    """What a whole model draws of the grid's captions -> pixels (N, 3, H, W)."""
    model = load_with_libraries(folder)
    painter: Any = model.painter
    painter.taken_apart = None  # as `assemble` draws, to the last bit
    for network in (painter.unet, painter.vae):
        network.to(memory_format=torch.contiguous_format)
    images = [model(caption, seed=seed).images[0] for seed, caption in enumerate(assemble.CAPTIONS)]
    return torch.stack([torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1) for image in images])


def shows(picture: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """The grid has what each model by itself draws, in this order, under these names."""
    columns = {label: drawn_by(folder) for label, folder in models.items()}
    assert len({pixels.numpy().tobytes() for pixels in columns.values()}) == len(columns)  # or a mistake wouldn't show
    grid(columns, assemble.CAPTIONS, tmp_path / "expected.png")
    with Image.open(picture) as one, Image.open(tmp_path / "expected.png") as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_tuned_clip_is_shown_beside_the_one_it_began_with(
    data: Path, parts: dict[str, str], plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tuned(data, Path(parts["clip"]), tmp_path / "tuned")
    capsys.readouterr()
    out = assemble.run(settings({**parts, "clip": run}, tmp_path / "m", steps=STEPS))
    assert capsys.readouterr().out == f"{out}\n"
    shows(out / "grid.png", {"base": plain, "tuned": out}, tmp_path)
    capsys.readouterr()
    assemble.run(settings({**parts, "clip": run}, out, steps=STEPS))
    assert capsys.readouterr().out == f"Nothing to do: {out} holds this model.\n"
    card = (out / "MODEL_CARD.md").read_text()
    assert "(grid.png)" in card
    (row,) = (line for line in card.splitlines() if line.startswith("| text_to_image_r@1 |"))
    found = read_json(Path(run) / "retrieval.json")["splits"]["test"]
    assert "| on test pictures | base | tuned |" in card
    assert row.split("|")[2].strip().split(" ")[0] == f"{found['base']['text_to_image_r@1']['value']:.4g}"
    whole = dict.fromkeys(("clip", "vae", "unet"), str(out))
    again = assemble.run(settings(whole, tmp_path / "again", steps=STEPS))  # a model brings what is known of its parts
    for name in ("trainings", "retrieval"):
        assert read_json(again / "manifest.json")[name] == read_json(out / "manifest.json")[name]
    assert not (
        assemble.run(settings({**parts, "clip": run}, tmp_path / "n", steps=STEPS, grid=False)) / "grid.png"
    ).exists()
    assert "grid.png" not in (tmp_path / "n" / "MODEL_CARD.md").read_text()
    for name in ("unet", "clip", "vae", "text_encoder"):
        assert sha256_folder(tmp_path / "n" / name) == sha256_folder(out / name)


def test_of_a_swept_run_base_tuned_and_mix_are_shown(
    data: Path, parts: dict[str, str], plain: Path, tmp_path: Path
) -> None:
    run = Path(tuned(data, Path(parts["clip"]), tmp_path / "swept", sweep_alpha=True, min_cosine=-1))
    report = read_json(run / "retrieval.json")
    if report["alpha"]["chosen"] in (0, 1):  # which shows less; what a sweep chooses is not tested here
        mix = mixed(loading.load_clip(parts["clip"]), loading.load_clip(str(run / "model" / "tuned")), 0.5)
        mix.save(run / "model" / "clip")
        report["alpha"]["chosen"], report["clip"] = 0.5, loading.identity(str(run), "clip")
        (run / "retrieval.json").write_text(json.dumps(report))
    out = assemble.run(settings({**parts, "clip": str(run)}, tmp_path / "m", steps=STEPS))
    whole = assemble.run(settings({**parts, "clip": str(run / "model" / "tuned")}, tmp_path / "whole", steps=STEPS))
    assert not (whole / "grid.png").exists()
    label = f"alpha {report['alpha']['chosen']:g}"
    shows(out / "grid.png", {"base": plain, "tuned": whole, label: out}, tmp_path)
    assert f"| base | tuned | {label} |" in (out / "MODEL_CARD.md").read_text()


def test_an_adapter_becomes_part_of_the_unet(data: Path, parts: dict[str, str], plain: Path, tmp_path: Path) -> None:
    run = Path(tuned(data, Path(parts["clip"]), tmp_path / "adapted", tune="adapter"))
    out = assemble.run(settings({**parts, "clip": str(run)}, tmp_path / "m", steps=STEPS))
    weight = load_file(run / "model" / "adapter" / "adapter.safetensors")["weight"]
    before, after = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (plain, out))
    for name in before:
        reads = name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        assert torch.allclose(after[name], before[name] @ weight if reads else before[name], atol=1e-6)
    assert not torch.allclose(weight, torch.eye(16))
    assert sha256_folder(out / "text_encoder") == sha256_folder(plain / "text_encoder")
    assert draw(DiffusionPipeline.from_pretrained(out)).std() > 0
    shows(out / "grid.png", {"base": plain, "tuned": out}, tmp_path)
    adapter = identity(run / "model" / "adapter")
    assert read_json(out / "manifest.json")["parents"]["adapter"] == adapter
    assert "linear adapter" in (out / "MODEL_CARD.md").read_text()
    again = assemble.run(settings({**parts, "unet": str(out)}, tmp_path / "again", steps=STEPS))
    assert read_json(again / "manifest.json")["parents"]["adapter"] == adapter
    match = "has an adapter in it already, and .*adapted brings another; name the U-Net as it was before"
    refused(settings({**parts, "clip": str(run), "unet": str(again)}, tmp_path / "n", steps=STEPS), ModelError, match)


def test_without_the_clip_of_before_there_is_no_grid_and_the_reason(
    data: Path, parts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(parts["clip"], base)
    run = tuned(data, base, tmp_path / "tuned")

    def reason(name: str) -> str:
        capsys.readouterr()
        out = assemble.run(settings({**parts, "clip": run}, tmp_path / name, steps=STEPS))
        assert not (out / "grid.png").exists()
        assert "grid.png" not in (out / "MODEL_CARD.md").read_text()
        told, path, end = capsys.readouterr().out.split("\n")
        assert (path, end) == (str(out), "")
        return told

    swap_tokens(base / "model" / "clip")  # behind the same weights
    assert reason("a").startswith(f"There is no grid.png: The text encoder of {base} is not what the U-Net of ")
    file = base / "model" / "clip" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert reason("b") == f"There is no grid.png: {base} is not the CLIP any more that {run} began with."
    shutil.rmtree(base)
    assert reason("c").startswith(f"There is no grid.png: There is no model folder {base}; ")


def test_figures_of_another_clip_are_not_told(clip: Path, parts: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(clip, tmp_path / "clip")
    report = read_json(clip / "retrieval.json")
    (tmp_path / "clip" / "retrieval.json").write_text(json.dumps({**report, "clip": "0" * 64}))
    out = assemble.run(settings({**parts, "clip": str(tmp_path / "clip")}, tmp_path / "m", steps=STEPS))
    assert "retrieval" not in read_json(out / "manifest.json")
    assert "text_to_image_r@1 |" not in (out / "MODEL_CARD.md").read_text()


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


def test_a_plan_of_parts_that_are_not_here_fetches_nothing(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    plan = assemble.plan(settings({**parts, "vae": "nobody/nothing"}, tmp_path / "m"))
    assert plan["parts"].startswith("nobody/nothing, to be fetched")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_tells_the_size_of_a_unet_that_is_not_square(parts: dict[str, str], tmp_path: Path) -> None:
    other = Path(shutil.copytree(parts["unet"], tmp_path / "unet"))
    file = other / "model" / "unet" / "config.json"
    factor = SIDE // read_json(file)["sample_size"]
    for size, said in ([4, 6], f"{6 * factor}x{4 * factor} pixels"), (None, None):
        write_json(file, read_json(file) | {"sample_size": size})
        asked = settings({**parts, "unet": str(other)}, tmp_path / "m")
        if said is None:
            refused(asked, ModelError, "The U-Net doesn't say its sample_size")
        else:
            assert assemble.plan(asked)["draws"] == said


# ---- mistakes


def test_a_vae_that_the_unet_was_not_trained_on_is_told(
    parts: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assemble.plan(settings(parts, tmp_path / "m"))
    assert "another VAE" not in caplog.text
    other = Path(shutil.copytree(parts["vae"], tmp_path / "vae"))
    file = next((other / "model" / "vae").glob("*.safetensors"))
    weights = load_file(file)
    save_file(weights | {"quant_conv.bias": weights["quant_conv.bias"] + 1}, file, {"format": "pt"})
    assemble.plan(settings({**parts, "vae": str(other)}, tmp_path / "m"))
    assert f"was trained on latents of another VAE than {other}" in caplog.text


def test_parts_that_do_not_fit_are_named(parts: dict[str, str], tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "sd")
    match = (
        r"The text encoder of .*clip is not what the U-Net of .*sd was .* \(width 16 against 32, .*\); take or tune "
    )
    refused(settings({**parts, "unet": str(other)}, tmp_path / "m"), ModelError, match)
    clip = tmp_path / "clip"
    tiny_clip().save_pretrained(clip)
    tiny_tokenizer(clip)
    file = clip / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["vocab_size"] = 601
    torch.manual_seed(0)
    CLIPModel(CLIPModel.config_class.from_dict(config)).save_pretrained(clip)
    unet = tmp_path / "unet"  # which tells its width alone
    tiny_unet(in_channels=3).save_pretrained(unet / "unet")
    tiny_scheduler().save_pretrained(unet / "scheduler")
    match = (
        "the VAE's latent channels 4 against the U-Net's in_channels 3, "
        "the tokenizer's entries 600 against the text encoder's vocab_size 601; take parts"
    )
    refused(settings({"vae": str(other), "clip": str(clip), "unet": str(unet)}, tmp_path / "m"), ModelError, match)


def test_a_unet_run_wants_the_clip_that_its_latents_were_encoded_with(
    parts: dict[str, str], latents: Path, clip: Path, tmp_path: Path
) -> None:
    text = read_json(Path(parts["unet"]) / "manifest.json")["text"]
    assert text == read_json(latents / "manifest.json")["text"]
    assert (text["width"], text["layers"], text["positions"]) == (16, 1, 77)
    assert gate.wanted(parts["unet"]) == gate.TextFacts(**text)
    shutil.copytree(clip, tmp_path / "clip")
    swap_tokens(tmp_path / "clip" / "model" / "clip")
    match = r"\(other tokens under the same numbers\); take or tune the CLIP that the U-Net was trained with\.$"
    refused(settings({**parts, "clip": str(tmp_path / "clip")}, tmp_path / "m"), ModelError, match)


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
