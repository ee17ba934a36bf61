"""Networks of PyTorch alone answer as the libraries' own, bit for bit, and what they don't know is left to those."""

from __future__ import annotations

import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from limner.errors import ModelError
from limner.models import bare, loading, plain, staged
from limner.models import vae as vaes
from limner.models.plain import text, unet, vae
from limner.models.plain.layers import Network
from tiny import WIDTH, tiny_taesd, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae

FP32 = torch.float32
ODD = ["A dog\u2019s", " <|endoftext|>", "<|startoftext|>", "E\u0301", "\u00a0", "12's", "It'll"]
UNETS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1": {},
    "Stable Diffusion 2": {"use_linear_projection": True, "upcast_attention": True, "attention_head_dim": (2, 4)},
    "attention everywhere": {"down_block_types": ("CrossAttnDownBlock2D",) * 2},
    "layers": {"layers_per_block": 2, "transformer_layers_per_block": 2},
    "guidance as an input": {"time_cond_proj_dim": 16},
    "sizes": {"in_channels": 8, "out_channels": 3, "conv_in_kernel": 5, "time_embedding_dim": 24, "norm_eps": 1e-3},
    "odd waves": {"block_out_channels": (4, 8, 12), "norm_num_groups": 2, "flip_sin_to_cos": False, "freq_shift": 1}
    | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")}
    | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
}
VAES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "three resolutions": {"block_out_channels": (8, 16, 24), "layers_per_block": 2}
    | {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3},
    "without attention": {"mid_block_add_attention": False},
    "without more convolutions": {"use_quant_conv": False, "use_post_quant_conv": False},
}


def saved(network: Any, folder: Path) -> str:
    """A reference to the network in a folder."""
    network.save_pretrained(folder)
    return str(folder)


def changed_vae(**changes: Any) -> AutoencoderKL:
    """`tiny_vae` with other settings."""
    usual = {name: value for name, value in tiny_vae().config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    return AutoencoderKL(**(usual | changes)).eval()


def both(ref: str, name: str, dtype: torch.dtype = FP32) -> tuple[Any, Any]:
    """The network of PyTorch alone, and the libraries'."""
    ours, theirs = (getattr(source, f"load_{name}")(ref, dtype) for source in (plain, loading))
    if name == "text_encoder":
        ours, theirs = ours[0], theirs[0]
    assert isinstance(ours, Network)
    assert not isinstance(theirs, Network)
    for network in (ours, theirs):
        bare.lay_bare(network)
    assert ours.dtype == theirs.dtype == dtype
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    return ours, theirs


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", UNETS.values(), ids=UNETS)
@torch.no_grad()
def test_a_unet_answers_as_diffusers_does(changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    ours, theirs = both(saved(tiny_unet(**changes), tmp_path), "unet", dtype)
    latents = torch.randn(2, ours.config["in_channels"], 8, 8).to(dtype)
    states = torch.randn(4, 7, WIDTH).to(dtype)
    condition = torch.randn(1, 16).to(dtype) if "time_cond_proj_dim" in changes else None
    for timestep in (torch.tensor(600), torch.tensor([1, 999]), torch.tensor(0.5)):
        answers = [
            staged.Passes(network.config, staged.Staged(network))(latents, timestep, states, condition)[0]
            for network in (ours, theirs)
        ]
        assert answers[0].std() > 0.01
        assert torch.equal(*answers)


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", VAES.values(), ids=VAES)
@torch.no_grad()
def test_a_vae_answers_as_diffusers_does(changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    ours, theirs = both(saved(changed_vae(**changes), tmp_path), "vae", dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ours, theirs = (network.to(memory_format=memory_format) for network in (ours, theirs))
        pixels, latents = torch.rand(2, 3, 24, 16).to(dtype), torch.randn(2, 4, 6, 10).to(dtype)
        assert torch.equal(vaes.encode(ours, pixels), vaes.encode(theirs, pixels))
        assert torch.equal(vaes.decode(ours, latents), vaes.decode(theirs, latents))
        assert vaes.decode(ours, latents).std() > 0.01


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}], ids=str)
@torch.no_grad()
def test_a_text_encoder_answers_as_transformers_does(
    changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    config = CLIPTextConfig(**{**tiny_text_encoder().config.to_dict(), **changes})
    torch.manual_seed(0)
    ref = saved(CLIPTextModel(config).eval(), tmp_path / "text_encoder")
    tiny_tokenizer(tmp_path / "tokenizer")
    ours, theirs = both(str(tmp_path), "text_encoder", dtype)
    ids = torch.randint(config.vocab_size, (3, 77))
    assert torch.equal(ours(ids)[0], theirs(ids, attention_mask=None)[0])
    # As older versions of Transformers wrote it
    file = Path(ref) / "model.safetensors"
    weights = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(weights | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    assert torch.equal(plain.load_text_encoder(str(tmp_path), dtype)[0](ids)[0], ours(ids)[0])


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from([8, 16, 24]), min_size=1, max_size=3),
    st.data(),
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from([2, 4]),
)
@torch.no_grad()
def test_any_sizes_are_as_diffusers_has_them(
    channels: list[int], data: st.DataObject, layers: int, linear: bool, heads: int
) -> None:
    attends = data.draw(st.lists(st.booleans(), min_size=len(channels), max_size=len(channels)))
    theirs = tiny_unet(
        block_out_channels=tuple(channels),
        down_block_types=tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
        layers_per_block=layers,
        use_linear_projection=linear,
        attention_head_dim=heads,
    )
    ours = unet.UNet(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, WIDTH)
    answer, wanted = (staged.Staged(network) for network in (ours, theirs))
    prompts = [network.keys_and_values(states) for network in (answer, wanted)]
    time = torch.tensor(321)
    assert torch.equal(answer.step(latents, time, prompts[0])[0], wanted.step(latents, time, prompts[1])[0])


def test_what_files_leave_out_is_as_the_libraries_have_it() -> None:
    for ours, cls in ((staged.SIZES | staged.FIXED, UNet2DConditionModel), (vae.DEFAULTS, AutoencoderKL)):
        theirs = {name: known.default for name, known in inspect.signature(cls).parameters.items()}
        for name, value in ours.items():
            default = theirs[name]
            assert (list(value) == list(default)) if isinstance(default, tuple) else value == default
        others = {name: value for name, value in theirs.items() if name not in ours}
        if cls is UNet2DConditionModel:
            assert not any(others.values()), "or `fits` would take what is not the default"
    for name, value in text.DEFAULTS.items():
        assert getattr(CLIPTextConfig(), name, False) == value


OTHERS: dict[str, Any] = {
    "unet of classes": lambda: tiny_unet(num_class_embeds=3),
    "unet that scales": lambda: tiny_unet(resnet_time_scale_shift="scale_shift"),
    "unet of layers by block": lambda: tiny_unet(layers_per_block=(1, 1)),
    "unet of narrower heads": lambda: tiny_unet(attention_head_dim=(2, 3)),
    "vae that is tiny": tiny_taesd,
    "vae of another activation": lambda: changed_vae(act_fn="gelu"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_not_known_is_left_to_the_libraries(what: str, tmp_path: Path) -> None:
    ref = saved(OTHERS[what](), tmp_path)
    assert not isinstance(getattr(plain, f"load_{what.split(maxsplit=1)[0]}")(ref), Network)


@pytest.mark.parametrize("fault", ["lacks a weight", "has a weight of another shape", "is no safetensors", "config"])
def test_faults_are_named_by_the_libraries(fault: str, tmp_path: Path) -> None:
    ref = saved(tiny_vae(), tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    if fault == "lacks a weight":
        del weights["decoder.conv_in.bias"]
        save_file(weights, file)
    elif fault == "has a weight of another shape":
        save_file(weights | {"decoder.conv_in.bias": torch.zeros(7)}, file)
    elif fault == "is no safetensors":
        file.write_bytes(b"no weights")
    else:
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": "all"}))
    with pytest.raises(ModelError, match="VAE"):
        plain.load_vae(ref)


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.text(),
            st.sampled_from(["A dog\u2019s", " <|endoftext|>", "<|startoftext|>", "E\u0301", "\u00a0", "12's"]),
        )
    )
)
def test_any_text_has_the_tokens_of_transformers(parts: list[str]) -> None:
    ours, theirs = tokenizers()
    given = "".join(parts)
    read = {"add_special_tokens": False, "verbose": False}
    assert ours(given, **read)["input_ids"] == theirs(given, **read)["input_ids"]


@functools.cache
def tokenizers() -> tuple[Any, Any]:
    """The built-in model's, here and as Transformers has it."""
    ours, theirs = plain.load_text_encoder("builtin")[1], loading.load_tokenizer("builtin")
    assert isinstance(ours, text.Tokenizer)
    for name in ("model_max_length", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    return ours, theirs


@pytest.mark.parametrize("how", ["added", "tokenizer_config", "special_tokens_map"])
def test_a_tokenizer_that_is_not_known_is_left_to_transformers(how: str, tmp_path: Path) -> None:
    saved(tiny_text_encoder(), tmp_path / "text_encoder")
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    assert isinstance(plain.load_text_encoder(str(tmp_path))[1], text.Tokenizer)
    if how == "added":
        tokenizer.add_tokens(["sks"])
        tokenizer.save_pretrained(tmp_path / "tokenizer")
    elif how == "tokenizer_config":
        file = tmp_path / "tokenizer" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"split_special_tokens": True}))
    else:
        (tmp_path / "tokenizer" / "special_tokens_map.json").write_text("{}")
    assert isinstance(plain.load_text_encoder(str(tmp_path))[1], CLIPTokenizer)


def test_a_picture_is_drawn_without_the_libraries_networks() -> None:
    script = (
        "import limner, sys\n"
        "limner.load('builtin')('A dog.', steps=1)\n"
        "heavy = ('diffusers.models.modeling_utils', 'transformers', 'accelerate', 'peft', 'torch._dynamo')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
