"""A LoRA changes a picture as it does in Diffusers, and is refused where it doesn't fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from libraries import load_with_libraries
from limner import load
from limner.artifacts import sha256
from limner.config import TrainLoraConfig
from limner.errors import ConfigError, ModelError
from limner.generation import painters
from limner.generation.engine import paint
from limner.generation.jobs import read_loras, read_spec
from limner.generation.model import Model
from limner.models import lora
from limner.models.bare import lay_bare
from tiny import WIDTH, tiny_text_encoder, tiny_unet
from trainings import config

STEPS, GUIDANCE = 2, 4.0


def made(folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """The files of a LoRA for `tiny_unet`, as `train lora` would leave them, of random numbers. -> `folder`."""
    unet = tiny_unet(**settings.pop("unet", {}))
    lora.add(unet, config(TrainLoraConfig, Path("d"), Path("o"), model="m", **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir()
    lora.save(unet, folder, {})
    return folder


def draw(model: Model) -> Tensor:
    """A picture, before it is rounded (1, 3, H, W)."""
    painter = model.painter
    assert isinstance(painter, painters.LatentDiffusion)
    parts = painter.unet, painter.scheduler, painter.vae, painter.text_encoder, painter.tokenizer
    return paint(*parts, ["A dog."], seeds=[3], steps=STEPS, guidance=GUIDANCE)


def ours(folder: Path, *loras: object) -> Tensor:
    """What Limner draws."""
    return draw(load_with_libraries(folder, loras=[str(text) for text in loras]))


def theirs(folder: Path, *files: Path, weights: tuple[float, ...] = ()) -> Tensor:
    """What Diffusers draws."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    names = [f"number {number}" for number in range(len(files))]
    for file, name in zip(files, names):
        pipeline.load_lora_weights(file, adapter_name=name)
    if weights:
        pipeline.set_adapters(names, list(weights))
    generator = [torch.Generator().manual_seed(3)]
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "generator": generator}
    return 2 * pipeline("A dog.", output_type="pt", **settings).images - 1


def changes(folder: Path, *loras: object) -> dict[str, Tensor]:
    """What LoRAs add to the U-Net's weights."""
    plain, changed = (
        load(str(folder), device="cpu", precision="fp32", loras=[str(text) for text in texts]).painter.unet.state_dict()  # type: ignore[attr-defined]
        for texts in ((), loras)
    )
    assert plain.keys() == changed.keys()
    return {name: changed[name] - plain[name] for name in plain if not torch.equal(plain[name], changed[name])}


# ---- the same picture as Diffusers'


def test_it_draws_what_diffusers_draws_with_any_weight(folder: Path, tmp_path: Path) -> None:
    file = made(tmp_path / "lora", rank=4, alpha=3) / lora.FILE
    plain = ours(folder)
    for weight in (1, 0.5, -2):
        drawn = ours(folder, f"{file}:{weight}")
        assert_close(drawn, theirs(folder, file, weights=(weight,)), atol=1e-5, rtol=0)
        assert (drawn - plain).abs().max() > 0.01
    assert torch.equal(ours(folder, file), ours(folder, f"{tmp_path / 'lora'}:1.0")), "its folder will do"


def test_two_loras_add(folder: Path, tmp_path: Path) -> None:
    one, two = (made(tmp_path / str(seed), seed=seed) / lora.FILE for seed in (1, 2))
    both = changes(folder, f"{one}:0.5", two)
    first, second = changes(folder, one), changes(folder, two)
    assert len(both) == 32, "four projections, twice in each of four blocks"
    for name, change in both.items():
        assert_close(change, 0.5 * first[name] + second[name], atol=1e-6, rtol=1e-4)
    drawn = ours(folder, f"{one}:0.5", two)
    assert_close(drawn, theirs(folder, one, two, weights=(0.5, 1.0)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dora", [False, True])
def test_a_weight_of_zero_is_the_plain_picture(folder: Path, tmp_path: Path, dora: bool) -> None:
    file = made(tmp_path / "lora", dora=dora) / lora.FILE
    assert torch.equal(ours(folder, f"{file}:0"), ours(folder))


@pytest.mark.parametrize("settings", [{"tune": "full"}, {"dora": True}, {"dora": True, "tune": "full"}])
def test_all_kinds_draw_what_diffusers_draws(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    made(tmp_path / "lora", alpha=2, **settings)
    drawn = ours(folder, tmp_path / "lora")
    assert_close(drawn, theirs(folder, tmp_path / "lora"), atol=1e-5, rtol=0)
    assert (drawn - ours(folder)).abs().max() > 0.01


@pytest.mark.parametrize("tune", ["attention", "full"])
def test_the_kohya_file_says_the_same(folder: Path, tmp_path: Path, tune: str) -> None:
    made(tmp_path / "lora", rank=4, alpha=3, tune=tune)
    file = tmp_path / "lora" / lora.KOHYA_FILE
    drawn = ours(folder, tmp_path / "lora")
    assert_close(ours(folder, file), drawn, atol=1e-5, rtol=0)
    assert_close(theirs(folder, file), drawn, atol=1e-5, rtol=0)


def test_alphas_of_kohya_may_differ(folder: Path, tmp_path: Path) -> None:
    file = made(tmp_path / "lora") / lora.KOHYA_FILE
    names = ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in"]
    given: dict[str, Tensor] = {}
    for name, rank, alpha in zip(names, (2, 3), (1.0, 6.0)):
        shape = tiny_unet().get_submodule(name).weight.shape
        key = f"lora_unet_{name.replace('.', '_')}"
        given[f"{key}.lora_down.weight"] = torch.randn(rank, *shape[1:])
        given[f"{key}.lora_up.weight"] = torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
        given[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(given, file)
    found = changes(folder, file)
    assert set(found) == {f"{name}.weight" for name in names}
    for name, share in zip(names, (0.5, 2.0)):
        key = f"lora_unet_{name.replace('.', '_')}"
        up, down = (given[f"{key}.lora_{part}.weight"].flatten(1) for part in ("up", "down"))
        assert_close(found[f"{name}.weight"].flatten(1), share * up @ down, atol=1e-5, rtol=1e-4)


def text_lora(file: Path, *, kohya: bool) -> Path:
    """A LoRA of the text encoder, in either layout. -> `file`."""
    names = [f"encoder.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in ("q", "out")]
    torch.manual_seed(0)
    tensors = {}
    for name in names:
        key = f"lora_te_text_model_{name.replace('.', '_')}" if kohya else f"text_encoder.text_model.{name}"
        parts = ("lora_down", "lora_up") if kohya else ("lora_linear_layer.down", "lora_linear_layer.up")
        tensors |= {f"{key}.{part}.weight": torch.randn(shape) for part, shape in zip(parts, [(2, WIDTH), (WIDTH, 2)])}
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("kohya", [False, True])
def test_the_text_encoder_is_changed_too(folder: Path, tmp_path: Path, kohya: bool) -> None:
    file = text_lora(tmp_path / "text.safetensors", kohya=kohya)
    drawn = ours(folder, f"{file}:0.5")
    assert_close(drawn, theirs(folder, file, weights=(0.5,)), atol=1e-5, rtol=0)
    assert (drawn - ours(folder)).abs().max() > 0.001
    assert changes(folder, file) == {}


def test_what_draws_is_as_plain_as_before(folder: Path, tmp_path: Path) -> None:
    made(tmp_path / "lora")
    loaded = Model.load(str(folder), "cpu", [str(tmp_path / "lora")] * 2, precision="fp32")
    for network, plain in (
        (loaded.painter.unet, tiny_unet()),  # type: ignore[attr-defined]
        (loaded.painter.text_encoder, tiny_text_encoder()),  # type: ignore[attr-defined]
    ):
        lay_bare(plain)
        kinds: list[list[type[nn.Module]]] = [[type(m) for m in n.modules()] for n in (network, plain)]
        assert kinds[0] == kinds[1]
        assert not hasattr(network, "peft_config")


# ---- the record


def test_the_record_names_each_lora(folder: Path, tmp_path: Path) -> None:
    file = made(tmp_path / "lora") / lora.FILE
    model = load(str(folder), device="cpu", precision="fp32", loras=[f"{file}:0.5", str(tmp_path / "lora")])
    record = model("A dog.", steps=1).pictures[0].record
    digest = sha256(file)
    assert record["model"]["loras"] == [
        {"ref": str(file), "sha256": digest, "weight": 0.5},
        {"ref": str(tmp_path / "lora"), "sha256": digest, "weight": 1.0},
    ]
    plain = load(str(folder), device="cpu").facts
    assert plain == {**record["model"], "loras": []}


# ---- refusals


def refused(error: type[Exception], call: Callable[[], object], *parts: str) -> None:
    """A refusal in one sentence with these parts."""
    with pytest.raises(error) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    for part in parts:
        assert part in said


def test_a_lora_for_another_architecture_is_refused_by_its_first_misfit(folder: Path, tmp_path: Path) -> None:
    wider = made(tmp_path / "wider", unet={"cross_attention_dim": WIDTH + 8})
    for file in (wider / lora.FILE, wider / lora.KOHYA_FILE):
        said = ("attn2.to_k.lora_A.weight is of shape (4, 40), for weights of shape (32, 32)", "choose one")
        refused(ModelError, partial(ours, folder, f"{file}:0"), *said)
    narrower = made(tmp_path / "narrower", unet={"block_out_channels": (16, 16)})
    refused(ModelError, lambda: ours(folder, narrower), "is of shape (4, 16), for weights of shape (32, 32)")
    taller = made(tmp_path / "taller", unet={"down_block_types": ("CrossAttnDownBlock2D",) * 2})
    for file in (taller / lora.FILE, taller / lora.KOHYA_FILE):
        refused(ModelError, partial(ours, folder, file), "it changes down_blocks.0.attentions", "which is not there")
    dora = made(tmp_path / "dora", dora=True) / lora.FILE
    tensors = {name: t[:3] if "magnitude" in name else t for name, t in load_file(dora).items()}
    save_file(tensors, dora)
    refused(ModelError, lambda: ours(folder, dora), "lora_magnitude_vector is of shape (3,)")
    ups = {name: t[:3] if "lora_B" in name else t for name, t in load_file(wider.parent / "taller" / lora.FILE).items()}
    save_file({n: t for n, t in ups.items() if "mid_block" in n}, dora)
    refused(ModelError, lambda: ours(folder, dora), "lora_B.weight is of shape (3, 4)")
    save_file({"transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 2)}, dora)
    refused(ModelError, lambda: ours(folder, dora), "transformer.blocks.0.attn.to_q.lora_A.weight, which is not there")


def test_what_is_no_lora_is_refused_before_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    spec = read_spec(str(folder))
    file = tmp_path / "it.safetensors"

    def read() -> object:
        return read_loras(spec, [str(file)])

    refused(ModelError, read, f"There is no LoRA {file}; name")
    refused(ModelError, lambda: read_loras(spec, [f"{file}:strong"]), f"There is no LoRA {file}:strong; name")
    refused(ModelError, lambda: read_loras(spec, [str(tmp_path)]), f"{tmp_path} holds no pytorch_lora_weights")
    file.touch()
    refused(ModelError, read, "not a whole safetensors file")
    file.write_bytes(pickle.dumps({"lora_A": [1.0]}))
    refused(ModelError, read, "not a whole safetensors file", "may carry code")
    torch.save({"lora_A": torch.ones(2)}, file)
    refused(ModelError, read, "not a whole safetensors file", "may carry code")
    file.write_bytes((made(tmp_path / "lora") / lora.FILE).read_bytes()[:-1])
    refused(ModelError, read, "not a whole safetensors file")
    save_file({}, file)
    refused(ModelError, read, "is empty")
    for weight in ("nan", "inf"):
        refused(ConfigError, partial(read_loras, spec, [f"{file}:{weight}"]), "must be a finite number")


def test_kinds_that_diffusers_would_read_by_half_are_refused(folder: Path, tmp_path: Path) -> None:
    given = load_file(made(tmp_path / "lora") / lora.KOHYA_FILE)
    file = tmp_path / "it.safetensors"
    layer = next(iter(given)).partition(".")[0]
    for name in (f"{layer}.dora_scale", f"{layer}.hada_w1_a"):
        save_file({**given, name: torch.ones(32)}, file)
        refused(ModelError, lambda: ours(folder, file), f"has {name}, which Limner does not read; choose")
    given.pop(f"{layer}.lora_up.weight")
    save_file(given, file)
    refused(ModelError, lambda: ours(folder, file), f"lacks a half of {layer}; fetch")


def test_other_pipelines_take_none(folder: Path, tmp_path: Path) -> None:
    spec = replace(read_spec(str(folder)), own_loop=False)
    made(tmp_path / "lora")
    refused(ModelError, lambda: read_loras(spec, [str(tmp_path / "lora")]), "Stable Diffusion 1 and 2 only")


# ---- other programs' files


def test_a_lora_of_peft_without_settings_is_read(folder: Path, tmp_path: Path) -> None:
    """What scripts of Diffusers leave: no head, and then alpha is the rank."""
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(unet))
    drawn = ours(folder, tmp_path / "lora")
    assert_close(drawn, theirs(folder, tmp_path / "lora"), atol=1e-5, rtol=0)
    assert (drawn - ours(folder)).abs().max() > 0.01
