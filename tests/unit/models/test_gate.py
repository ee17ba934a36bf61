"""A U-Net gets the text encoder that it was trained to read, or a sentence; an adapter changes no prediction."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

from limner.errors import ModelError
from limner.models import adapter, gate, loading
from limner.models.clip import new_tokenizer
from limner.models.gate import TextFacts
from tiny import CAPTIONS, VOCABULARY, WIDTH, tiny_clip, tiny_model, tiny_text_encoder, tiny_tokenizer, tiny_unet

SD1 = TextFacts(768, 12, 49_408, 77, "quick_gelu", 1e-5, 49_407)
SD2 = TextFacts(1024, 23, 49_408, 77, "gelu", 1e-5, 0)
OTHER: dict[str, Any] = {
    "width": 16,
    "layers": 3,
    "vocabulary": 700,
    "positions": 64,
    "activation": "gelu",
    "norm_epsilon": 1e-6,
    "padding": 7,
    "tokens": "0" * 64,
}
"""Facts that are not those of tiny models."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a text encoder and a tokenizer beside the U-Net."""
    return tiny_model(tmp_path_factory.mktemp("gate") / "model")


def facts_of(ref: Path) -> TextFacts:
    """The facts of the text encoder that loading gives."""
    encoder, tokenizer = loading.load_text_encoder(str(ref))
    return TextFacts.of(encoder.config.to_dict(), tokenizer)


def text_model(folder: Path, **values: Any) -> Path:
    """A CLIPTextModel of these settings, in a folder with the tiny tokenizer."""
    settings = {"vocab_size": VOCABULARY, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 8}
    CLIPTextModel(CLIPTextConfig(**{**settings, **values})).save_pretrained(folder / "text_encoder")
    tiny_tokenizer(folder / "tokenizer")
    return folder


def refusal(given: TextFacts, wanted: TextFacts, unet: Path | str = "builtin") -> str:
    """The one sentence of a refusal."""
    with pytest.raises(ModelError) as caught:
        gate.check(given, wanted, clip="runs/clip", unet=str(unet))
    sentence = str(caught.value)
    assert sentence.startswith(f"The text encoder of runs/clip is not what the U-Net of {unet} was trained to read (")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


# ---- what is known


def test_the_text_encoder_beside_the_unet_tells(model: Path) -> None:
    wanted = gate.wanted(str(model))
    assert wanted == facts_of(model)
    assert None not in asdict(wanted).values()
    assert (wanted.width, wanted.layers, wanted.vocabulary, wanted.padding) == (WIDTH, 2, VOCABULARY, VOCABULARY - 1)
    gate.check(facts_of(model), wanted, clip="a", unet=str(model))


def test_a_config_without_defaults_is_read_as_transformers_reads_it(model: Path) -> None:
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    short = {name: value for name, value in config.items() if name not in {"hidden_act", "layer_norm_eps"}}
    assert TextFacts.of(short) == TextFacts.of(config)
    assert TextFacts.of(config) == replace(gate.wanted(str(model)), padding=None, tokens=None)


def test_the_manifest_of_a_training_tells(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "model" / "unet")
    clip = facts_of(text_model(tmp_path / "clip", hidden_size=WIDTH, hidden_act="gelu"))
    (tmp_path / "manifest.json").write_text(json.dumps({"parents": {}, "text": asdict(clip)}))
    assert gate.wanted(str(tmp_path)) == clip
    sentence = refusal(replace(clip, tokens="0" * 64), clip, tmp_path)
    assert "(other tokens under the same numbers); take or tune the CLIP that the U-Net was trained with." in sentence


def test_a_unet_alone_tells_its_width(tmp_path: Path) -> None:
    tiny_unet(cross_attention_dim=24).save_pretrained(tmp_path / "unet")
    assert gate.wanted(str(tmp_path)) == TextFacts(width=24)
    (tmp_path / "manifest.json").write_text('{"parents": {}, "images": 8}')  # of before facts were kept
    assert gate.wanted(str(tmp_path)) == TextFacts(width=24)


def test_the_unets_own_width_counts(model: Path, tmp_path: Path) -> None:
    """Stable Diffusion XL has two text encoders side by side, and the first is not all that its U-Net reads."""
    folder = tiny_model(tmp_path, unet=tiny_unet(cross_attention_dim=24))
    assert f"(width {WIDTH} against 24)" in refusal(facts_of(model), gate.wanted(str(folder)), folder)


def test_a_unet_that_reads_no_clip_is_refused(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "unet")
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"architectures": ["T5EncoderModel"]}')
    with pytest.raises(ModelError, match="was trained to read a T5EncoderModel, not a CLIP; choose another U-Net"):
        gate.wanted(str(tmp_path))


# ---- what is refused


@pytest.mark.parametrize("name", OTHER)
def test_each_fact_counts(model: Path, name: str) -> None:
    known = gate.wanted(str(model))
    given = replace(known, **{name: OTHER[name]})
    word = {"norm_epsilon": "layer_norm_eps", "padding": "padding token"}.get(name, name)
    told = f"({word} {OTHER[name]} against {getattr(known, name)})"
    sentence = refusal(given, known, model)
    assert (told if name != "tokens" else "(other tokens under the same numbers)") in sentence
    assert f"the text encoder beside the U-Net in {model}" in sentence
    gate.check(given, replace(known, **{name: None}), clip="a", unet=str(model))  # what isn't known can't differ


@settings(max_examples=50)
@given(names=st.sets(st.sampled_from(sorted(OTHER))), unknown=st.sets(st.sampled_from(sorted(OTHER))))
def test_every_difference_is_named_and_no_other(names: set[str], unknown: set[str]) -> None:
    given = replace(TextFacts(32, 2, 600, 77, "quick_gelu", 1e-5, 599, "1" * 64), **{n: OTHER[n] for n in names})
    known = TextFacts(32, 2, 600, 77, "quick_gelu", 1e-5, 599, "1" * 64)
    wanted = replace(known, **dict.fromkeys(unknown))
    if not names - unknown:
        gate.check(given, wanted, clip="runs/clip", unet="builtin")
        return
    sentence = refusal(given, wanted)
    for name in OTHER:
        words = {"norm_epsilon": "layer_norm_eps ", "padding": "padding token ", "tokens": "other tokens under"}
        told = words.get(name, f"{name} ") in sentence.split("read (")[1].split(");")[0]
        silent = name == "tokens" and "vocabulary" in names - unknown
        assert told == (name in names - unknown and not silent), (name, sentence)


def test_vit_b_32_is_refused_by_a_stable_diffusion_1_unet(tmp_path: Path) -> None:
    """The commonest mistake, in networks of the true widths: the small CLIP is tuned, and the U-Net reads the large."""
    tiny_unet(cross_attention_dim=768).save_pretrained(tmp_path / "sd" / "unet")
    given = facts_of(text_model(tmp_path / "clip", hidden_size=512))
    sentence = refusal(given, gate.wanted(str(tmp_path / "sd")), tmp_path / "sd")
    assert "(width 512 against 768); take or tune openai/clip-vit-large-patch14, " in sentence
    text_model(tmp_path / "sd", hidden_size=768)
    sentence = refusal(given, gate.wanted(str(tmp_path / "sd")), tmp_path / "sd")
    assert f"(width 512 against 768); take or tune the text encoder beside the U-Net in {tmp_path / 'sd'}." in sentence


def test_the_well_known_text_encoders_are_named() -> None:
    assert "take or tune openai/clip-vit-large-patch14" in refusal(replace(SD1, width=512), SD1)
    assert "activation gelu against quick_gelu" in refusal(replace(SD1, activation="gelu"), SD1)
    small = refusal(SD1, SD2)
    for told in ("width 768 against 1024", "layers 12 against 23", "quick_gelu against gelu", "token 49407 against 0"):
        assert told in small
    assert "take the text encoder of stabilityai/stable-diffusion-2, which is OpenCLIP ViT-H/14 without its" in small
    assert "stabilityai/stable-diffusion-2" in refusal(SD1, TextFacts(width=1024))
    assert "take or tune the text encoder beside the U-Net in builtin." in refusal(SD1, TextFacts(width=320))


def test_a_whole_text_tower_is_refused_where_the_unet_reads_an_earlier_layer(tmp_path: Path) -> None:
    """Stable Diffusion 2 in small: 24 layers are given where 23 were cut out."""
    facts = {"hidden_size": 16, "hidden_act": "gelu"}
    tiny_unet(cross_attention_dim=16).save_pretrained(tmp_path / "sd" / "unet")
    text_model(tmp_path / "sd", num_hidden_layers=23, **facts)
    whole = facts_of(text_model(tmp_path / "clip", num_hidden_layers=24, **facts))
    sentence = refusal(whole, gate.wanted(str(tmp_path / "sd")), tmp_path / "sd")
    assert "(layers 24 against 23); cut its layers behind number 23, the last that the U-Net reads, or " in sentence
    assert sentence.endswith(f"or take the text encoder beside the U-Net in {tmp_path / 'sd'}.")
    for other in (replace(whole, layers=22), replace(whole, width=24)):  # which no cut would mend
        assert "cut" not in refusal(other, gate.wanted(str(tmp_path / "sd")), tmp_path / "sd")


def test_another_tokenizer_of_the_same_size_is_refused(model: Path, tmp_path: Path) -> None:
    tiny_text_encoder().save_pretrained(tmp_path / "text_encoder")
    other = new_tokenizer([caption[::-1] for caption in CAPTIONS], VOCABULARY)
    assert len(other) == VOCABULARY
    other.save_pretrained(tmp_path / "tokenizer")
    assert "(other tokens under the same numbers)" in refusal(facts_of(tmp_path), gate.wanted(str(model)), model)


# ---- the adapter


def unfolded_and_folded(**values: Any) -> tuple[Any, Any, torch.Tensor]:
    """A U-Net, the same with a random map folded into it, and the map."""
    weight = torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    folded = tiny_unet(**values)
    adapter.fold(folded, weight)
    return tiny_unet(**values), folded, weight


@torch.no_grad()
@pytest.mark.parametrize("values", [{}, {"only_cross_attention": True}], ids=["plain", "only cross attention"])
def test_a_folded_unet_reads_plain_states_as_it_read_adapted_ones(values: dict[str, Any]) -> None:
    unet, folded, weight = unfolded_and_folded(**values)
    source = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, 8, 8, generator=source)  # (N, C, h, w)
    states = torch.randn(2, 77, WIDTH, generator=source)  # (N, L, D)
    expected = unet(latents, 500, encoder_hidden_states=states @ weight.T).sample
    assert torch.allclose(folded(latents, 500, encoder_hidden_states=states).sample, expected, atol=1e-5)
    assert (unet(latents, 500, encoder_hidden_states=states).sample - expected).abs().max() > 1e-3


def test_only_what_reads_token_states_is_folded() -> None:
    unet, folded, weight = unfolded_and_folded()
    before, after = unet.state_dict(), folded.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    for name in changed:
        assert torch.allclose(after[name], before[name] @ weight, atol=1e-6)


def test_the_adapter_of_a_run_is_found_and_checked(tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path / "model" / "clip")
    assert adapter.find(str(tmp_path)) is None
    folder = tmp_path / "model" / "adapter"
    folder.mkdir()
    weight = torch.randn(WIDTH, WIDTH)
    save_file({"weight": weight}, folder / adapter.FILE)
    for ref in (tmp_path, tmp_path / "model", tmp_path / "model" / "clip"):
        assert adapter.find(str(ref)) == folder
    assert torch.equal(adapter.load(folder, WIDTH), weight)
    with pytest.raises(ModelError, match=r"adapter is 32x32 where token states are 16 wide; train it again") as caught:
        adapter.load(folder, 16)
    assert str(folder) in str(caught.value)
    save_file({"bias": weight}, folder / adapter.FILE)
    with pytest.raises(ModelError, match=r"The adapter in .* can't be read"):
        adapter.load(folder, WIDTH)
