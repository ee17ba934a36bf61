"""`limner train lora`, and what of a given U-Net `train unet` trains."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from commands import limner
from kills import kill, writes_of
from libraries import load_with_libraries
from limner.artifacts import is_finished, read_json, write_json
from limner.config import (
    AssembleConfig,
    EncodeConfig,
    TrainDistillConfig,
    TrainLoraConfig,
    TrainUnetConfig,
    TrainVaeConfig,
)
from limner.errors import ModelError
from limner.generation import provenance
from limner.generation.engine import paint
from limner.models import loading, lora
from limner.settings import resolve
from limner.stages import assemble, encode, train_distill, train_unet, train_vae
from trainings import config, weights

STEPS, GUIDANCE = 3, 3.0
PROMPT = "A red circle on a blue ground."
QUICK = {"images": 16, "lr": 0.02, "ema_halflife": 0}  # learns enough to be seen


@pytest.fixture(scope="module")
def model(clip: Path, vae: Path, unet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model."""
    parts = {"clip": clip, "vae": vae, "unet": unet}
    out = tmp_path_factory.mktemp("lora") / "model"
    return assemble.run(resolve(AssembleConfig, {name: str(p) for name, p in parts.items()} | {"out": out, "grid": 0}))


@pytest.fixture(scope="module")
def run(model: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command."""
    out = tmp_path_factory.mktemp("lora") / "run"
    settings = config(TrainLoraConfig, latents, out, model=str(model), alpha=2.0, **QUICK)
    file = out.with_name("settings.json")
    file.write_text(settings.model_dump_json(exclude={"data", "out", "model", "rank"}))
    flags = ["--data", latents, "--out", out, "--model", model, "--rank", 4, "--config", file]
    assert limner("train", "lora", *flags) == 0
    return out


def ours(model: Path, *loras: Path) -> Tensor:
    """What Limner draws, before it is rounded (1, 3, H, W)."""
    painter = load_with_libraries(model, loras=[str(path) for path in loras]).painter
    names = ("unet", "scheduler", "vae", "text_encoder", "tokenizer")
    parts = [getattr(painter, name) for name in names]
    return paint(*parts, [PROMPT], seeds=[3], steps=STEPS, guidance=GUIDANCE)


def theirs(model: Path, lora_folder: Path) -> Tensor:
    """What Diffusers draws."""
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora_folder)
    generator = [torch.Generator().manual_seed(3)]
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "generator": generator}
    return 2 * pipeline(PROMPT, output_type="pt", **settings).images - 1


# ---- the result


def test_it_changes_the_picture_in_diffusers_as_it_does_here(run: Path, model: Path) -> None:
    drawn = ours(model, run)
    assert_close(drawn, theirs(model, run / "model"), atol=1e-5, rtol=0)
    assert_close(drawn, theirs(model, run / "model" / lora.KOHYA_FILE), atol=1e-5, rtol=0)
    assert (drawn - ours(model)).abs().max() > 0.001


def test_so_does_dora_which_has_no_kohya_file(model: Path, latents: Path, tmp_path: Path) -> None:
    made = train_unet.run(config(TrainLoraConfig, latents, tmp_path / "r", model=str(model), dora=True, **QUICK))
    assert [path.name for path in (made / "model").iterdir()] == [lora.FILE]
    tensors = load_file(made / "model" / lora.FILE)
    assert any(name.endswith("lora_magnitude_vector") for name in tensors)
    drawn = ours(model, made)
    assert_close(drawn, theirs(model, made / "model"), atol=1e-5, rtol=0)
    assert (drawn - ours(model)).abs().max() > 0.001


def test_the_files_say_what_they_are_for(run: Path, model: Path) -> None:
    heads = {}
    for name in (lora.FILE, lora.KOHYA_FILE):
        with safe_open(run / "model" / name, framework="pt") as opened:
            heads[name] = opened.metadata()
            assert heads[name]["format"] == "pt"
            assert heads[name]["base_model"] == str(model)
            assert heads[name]["base_model_sha256"] == loading.identity(str(model), "unet")
    settings = json.loads(heads[lora.FILE]["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (4, 2)
    assert (heads[lora.KOHYA_FILE]["ss_network_dim"], heads[lora.KOHYA_FILE]["ss_network_alpha"]) == ("4", "2")
    assert {path.name for path in (run / "model").iterdir()} == {lora.FILE, lora.KOHYA_FILE}


def test_attention_alone_gets_additions_of_the_rank_and_alpha_is_the_rank(
    run: Path, model: Path, latents: Path, tmp_path: Path
) -> None:
    tensors = load_file(run / "model" / lora.FILE)
    assert {name.split(".lora_")[0].rsplit(".attn", 1)[1][2:] for name in tensors} == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {4}
    kv = config(TrainLoraConfig, latents, tmp_path / "r", model=str(model), tune="cross_attention_kv", images=8)
    kohya = load_file(train_unet.run(kv) / "model" / lora.KOHYA_FILE)
    assert {name.partition(".")[0].rsplit("_attn", 1)[1] for name in kohya} == {"2_to_k", "2_to_v"}
    assert {value.item() for name, value in kohya.items() if name.endswith(".alpha")} == {4}


def test_the_base_is_the_parent_and_is_in_no_checkpoint(run: Path, model: Path) -> None:
    assert read_json(run / "manifest.json")["parents"]["model"] == loading.identity(str(model), "unet")
    stored = load_file(run / "checkpoints" / "000000016" / "state.safetensors")
    assert all(".lora_" in name for name in stored if name.startswith("network."))


@pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL and forked workers")
def test_killed_and_resumed_it_ends_with_the_same_bits(model: Path, latents: Path, tmp_path: Path) -> None:
    def settings(name: str) -> TrainLoraConfig:
        every = {"checkpoint_every": 8, "images": 24}
        return config(TrainLoraConfig, latents, tmp_path / name, model=str(model), **QUICK | every)

    count = writes_of(train_unet.run, settings("whole"))
    kill(train_unet.run, settings("killed"), at_write=int(0.7 * count))
    assert not is_finished(tmp_path / "killed")
    assert any((tmp_path / "killed" / "checkpoints").iterdir()), "there is something to resume from"
    assert weights(train_unet.run(settings("killed"))) == weights(tmp_path / "whole")


# ---- through the command line


def test_generate_draws_with_it(
    run: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model", model, "--steps", 2]
    added = ["--lora", f"{run}:0.5", "--lora", run / "model" / lora.KOHYA_FILE]
    assert limner("generate", PROMPT, *flags, *added, "--dry-run") == 0
    assert f"{run} at 0.5, {run / 'model' / lora.KOHYA_FILE} at 1" in capfd.readouterr().out
    assert limner("generate", PROMPT, *flags, *added) == 0
    assert len(capfd.readouterr().err.splitlines()) == 1, "a line of progress and nothing else"
    (path,) = (tmp_path / "pictures").iterdir()
    assert [added["weight"] for added in provenance.read(path)["model"]["loras"]] == [0.5, 1.0]
    for wrong in ("missing.safetensors", model):
        assert limner("generate", PROMPT, *flags, "--lora", wrong, "--out", "other") == 2
    assert not (tmp_path / "other").exists()


# ---- what of a U-Net is trained


@pytest.mark.parametrize(
    ("tune", "layers"), [("cross_attention_kv", ("attn2.to_k.", "attn2.to_v.")), ("attention", (".attn1.", ".attn2."))]
)
def test_only_what_is_tuned_changes(unet: Path, latents: Path, tmp_path: Path, tune: str, layers: tuple[str]) -> None:
    settings = config(TrainUnetConfig, latents, tmp_path / "r", model=str(unet), tune=tune, images=16, workers=1)
    before, after = (loading.load_unet(str(path)).state_dict() for path in (unet, train_unet.run(settings)))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if any(layer in name for layer in layers)}
    assert (tmp_path / "r" / "model" / "scheduler").is_dir()


# ---- which VAE and text encoder


def test_latents_of_another_vae_are_refused_but_where_all_of_the_unet_can_get_used_to_them(
    model: Path, data: Path, clip: Path, vae: Path, unet: Path, latents: Path, tmp_path: Path
) -> None:
    other = train_vae.run(config(TrainVaeConfig, data, tmp_path / "vae", seed=1))
    cache = encode.run(config(EncodeConfig, data, tmp_path / "latents", clip=str(clip), vae=str(other)))
    for stage, cls, given in (
        (train_unet, TrainLoraConfig, {}),
        (train_unet, TrainUnetConfig, {"tune": "cross_attention_kv"}),
        (train_distill, TrainDistillConfig, {}),
    ):
        with pytest.raises(ModelError, match=r"has latents of the VAE .*, and .* has another; encode with --vae"):
            stage.run(config(cls, cache, tmp_path / "r", model=str(model), **given))
        with pytest.raises(
            ModelError, match=r"has latents of the VAE .*, and .* was trained on latents of another; enc"
        ):
            stage.run(config(cls, cache, tmp_path / "r", model=str(unet), **given))
        stage.plan(config(cls, latents, tmp_path / "r", model=str(unet), **given))
    assert not (tmp_path / "r").exists()
    train_unet.TrainUnet(config(TrainUnetConfig, cache, tmp_path / "r", model=str(model)))
    parts = {"clip": str(clip), "vae": str(vae), "unet": str(unet), "precision": "bf16", "grid": 0}
    rounded = assemble.run(resolve(AssembleConfig, {**parts, "out": tmp_path / "model"}))
    train_unet.TrainUnet(config(TrainLoraConfig, latents, tmp_path / "r", model=str(rounded)))


def test_states_through_an_adapter_are_not_for_a_model_that_reads_its_own(
    model: Path, data: Path, clip: Path, vae: Path, tmp_path: Path
) -> None:
    """Where such a model has the adapter, its U-Net has it in its weights already."""
    shutil.copytree(clip, tmp_path / "clip")
    (tmp_path / "clip" / "model" / "adapter").mkdir()
    save_file({"weight": torch.eye(16)}, tmp_path / "clip" / "model" / "adapter" / "adapter.safetensors")
    given = {"clip": str(tmp_path / "clip"), "vae": str(vae)}
    cache = encode.run(config(EncodeConfig, data, tmp_path / "latents", **given))
    with pytest.raises(ModelError, match=f"no LoRA reads such; encode with --clip {model}"):
        train_unet.run(config(TrainLoraConfig, cache, tmp_path / "r", model=str(model)))
    with pytest.raises(ModelError, match=f"another text encoder; encode with --clip {model}"):
        train_distill.run(config(TrainDistillConfig, cache, tmp_path / "r", model=str(model)))
    train_unet.TrainUnet(config(TrainUnetConfig, cache, tmp_path / "r", model=str(model)))


def test_a_unet_gets_used_to_another_clip_but_a_lora_is_for_the_one_its_model_has(
    model: Path, latents: Path, tmp_path: Path
) -> None:
    """A tuned CLIP has the same facts; one with other tokens has not."""
    shutil.copytree(latents, tmp_path / "latents")
    manifest = read_json(latents / "manifest.json")
    facts = {**manifest["text"], "tokens": "0" * 64}
    write_json(tmp_path / "latents" / "manifest.json", {**manifest, "text": facts})
    given = {"model": str(model), "images": 8}
    tuned = config(TrainUnetConfig, tmp_path / "latents", tmp_path / "r", tune="cross_attention_kv", **given)
    assert is_finished(train_unet.run(tuned))
    with pytest.raises(ModelError, match=r"other tokens under the same numbers\); take or tune the text encoder"):
        train_unet.run(config(TrainLoraConfig, tmp_path / "latents", tmp_path / "lora", **given))
    assert not (tmp_path / "lora").exists()
    (tmp_path / "latents" / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "text"}))
    assert train_unet.plan(config(TrainLoraConfig, tmp_path / "latents", tmp_path / "lora", **given))
