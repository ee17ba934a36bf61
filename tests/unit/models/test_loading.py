"""Finding and reading models and their parts, from every kind of folder that holds them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.testing import assert_close
from transformers import AutoTokenizer

from limner.errors import ModelError
from limner.models import clip as clips
from limner.models import loading
from tiny import (
    CAPTIONS,
    SCHEDULERS,
    tiny_clip,
    tiny_model,
    tiny_scheduler,
    tiny_siglip,
    tiny_siglip_tokenizer,
    tiny_taesd,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder with a CLIP."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    tiny_clip().save_pretrained(folder / "clip")
    tiny_tokenizer(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `train clip`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "checkpoints").mkdir()
    tiny_clip().save_pretrained(folder / "model" / "clip")
    tiny_tokenizer(folder / "model" / "clip")
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP in `clip` and a SigLIP in `siglip`, to be copied."""
    folder = tmp_path_factory.mktemp("sound")
    tiny_clip().save_pretrained(folder / "clip")
    tiny_tokenizer(folder / "clip")
    tiny_siglip().save_pretrained(folder / "siglip")
    tiny_siglip_tokenizer(folder / "siglip")
    return folder


@pytest.fixture
def clip(sound: Path, tmp_path: Path) -> Path:
    """A CLIP's own folder, to be spoilt."""
    return Path(shutil.copytree(sound / "clip", tmp_path / "clip"))


@pytest.fixture
def siglip(sound: Path, tmp_path: Path) -> Path:
    """A SigLIP's own folder, to be spoilt."""
    return Path(shutil.copytree(sound / "siglip", tmp_path / "siglip"))


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two networks hold the same numbers under the same names."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- references


def test_a_folder_is_itself(model: Path) -> None:
    assert loading.resolve(str(model)) == model
    assert not loading.is_hub_id(str(model))


def test_a_name_that_lies_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert loading.is_hub_id("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not loading.is_hub_id("owner/name")
    assert not loading.is_hub_id("builtin")


def test_the_built_in_model_is_there_or_its_absence_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BUILTIN", tmp_path)
    with pytest.raises(ModelError, match="no built-in model"):
        loading.resolve("builtin")
    (tmp_path / "model_index.json").write_text("{}")
    assert loading.resolve("builtin") == tmp_path


# ---- parts


@pytest.mark.parametrize("part", loading.CLASSES)
def test_a_part_is_found_in_a_model_a_run_and_its_own_folder(model: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(model / part, tmp_path / "run" / "model" / part)
    for ref, place in (
        (model, model / part),
        (model / part, model / part),
        (tmp_path / "run", tmp_path / "run" / "model" / part),
        (tmp_path / "run" / "model", tmp_path / "run" / "model" / part),
    ):
        assert loading.component(str(ref), part) == place


def test_a_part_that_is_missing_is_named_with_what_there_is(run: Path) -> None:
    with pytest.raises(ModelError, match=r"has no U-Net that Limner can use \(it holds clip\)"):
        loading.component(str(run), "unet")


def test_a_part_of_another_class_is_named(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet1DModel"}')
    with pytest.raises(ModelError, match=r"its U-Net is of class UNet1DModel"):
        loading.component(str(tmp_path), "unet")
    with pytest.raises(ModelError, match=r"no U-Net that Limner can use \(it is of class UNet1DModel"):
        loading.component(str(tmp_path / "unet"), "unet")


@pytest.mark.parametrize(
    ("config", "cls"),
    [
        ({"architectures": ["SiglipModel"], "model_type": "siglip"}, "SiglipModel"),
        ({"model_type": "siglip"}, "SiglipModel"),
        ({"architectures": [], "model_type": "clip"}, "CLIPModel"),
        ({"architectures": ["Siglip2Model"], "model_type": "siglip2"}, "Siglip2Model"),
        ({"architectures": "CLIPModel", "model_type": ["clip"]}, None),
        ({"model_type": "bert"}, None),
        ({}, None),
    ],
)
def test_the_class_of_a_part_is_what_its_config_names(tmp_path: Path, config: dict[str, Any], cls: str | None) -> None:
    assert loading.class_of(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert loading.class_of(tmp_path) == cls


def test_a_run_without_a_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ModelError, match="no result yet"):
        loading.component(str(tmp_path), "vae")


# ---- networks


@pytest.mark.parametrize(
    ("load", "original"),
    [
        (loading.load_unet, tiny_unet),
        (loading.load_vae, tiny_vae),
        (lambda ref: loading.load_text_encoder(ref)[0], tiny_text_encoder),
        (lambda ref: loading.load_clip(ref).network, tiny_clip),
    ],
    ids=["unet", "vae", "text encoder", "clip"],
)
def test_a_network_comes_back_with_its_weights_ready_to_use(model: Path, load: Any, original: Any) -> None:
    network = load(str(model))
    assert same_weights(network, original())
    assert not network.training
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_the_small_autoencoder_is_read_as_such(tmp_path: Path) -> None:
    tiny_taesd().save_pretrained(tmp_path / "vae")
    assert same_weights(loading.load_vae(str(tmp_path)), tiny_taesd())


def test_a_clip_run_has_a_text_encoder(run: Path) -> None:
    encoder, tokenizer = loading.load_text_encoder(str(run))
    ids = torch.tensor([tokenizer("A dog.", padding="max_length")["input_ids"]])
    with torch.no_grad():
        expected = tiny_clip().text_model(ids)[0]
        assert torch.equal(encoder(ids)[0], expected)


@torch.no_grad()
def test_a_siglip_comes_back_whole_out_of_any_folder_and_is_no_text_encoder(siglip: Path, tmp_path: Path) -> None:
    shutil.copytree(siglip, tmp_path / "run" / "model" / "clip")
    for ref in (siglip, tmp_path / "run"):
        loaded = loading.load_clip(str(ref))
        assert same_weights(loaded.network, tiny_siglip())
        assert not loaded.network.training
        ids = tiny_siglip_tokenizer(tmp_path / "again")(CAPTIONS, padding="max_length")["input_ids"]
        assert loaded.tokenize(CAPTIONS).tolist() == ids
        with pytest.raises(ModelError, match="is a SigLIP, whose text tower no U-Net"):
            loading.load_text_encoder(str(ref))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_a_clip_that_was_saved_gives_the_same_features(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}')
    before = loading.load_clip(str(folder))
    before.save(tmp_path / "saved")
    after = loading.load_clip(str(tmp_path / "saved"))
    assert after.normalisation == before.normalisation == {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    pixels = torch.rand(2, 3, after.size, after.size) * 2 - 1
    assert torch.equal(after.image_features(pixels), before.image_features(pixels))
    assert torch.equal(after.tokenize(CAPTIONS), before.tokenize(CAPTIONS))
    assert torch.equal(after.text_features(after.tokenize(CAPTIONS)), before.text_features(before.tokenize(CAPTIONS)))


def test_weights_stored_in_half_the_bytes_are_float32_in_memory_unless_asked(tmp_path: Path) -> None:
    tiny_unet().to(torch.bfloat16).save_pretrained(tmp_path / "unet")
    assert loading.load_unet(str(tmp_path)).dtype == torch.float32
    assert loading.load_unet(str(tmp_path), torch.bfloat16).dtype == torch.bfloat16


def test_the_only_variant_is_read_and_the_plain_weights_come_first(tmp_path: Path) -> None:
    tiny_unet(seed=1).save_pretrained(tmp_path / "unet", variant="fp16")
    assert same_weights(loading.load_unet(str(tmp_path)), tiny_unet(seed=1))
    tiny_unet(seed=2).save_pretrained(tmp_path / "unet")
    assert same_weights(loading.load_unet(str(tmp_path)), tiny_unet(seed=2))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_comes_back_with_its_settings(tmp_path: Path, name: str) -> None:
    tiny_scheduler(name).save_pretrained(tmp_path / "scheduler")
    loaded = loading.load_scheduler(str(tmp_path))
    assert type(loaded) is type(tiny_scheduler(name))
    for setting, value in SCHEDULERS[name][1].items():
        assert loaded.config[setting] == value


# ---- tokenizers


def named(folder: Path, cls: str | None) -> None:
    """Let the tokenizer in `folder` name another class, or none."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": cls}
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tokenizer_is_read_by_its_class_or_by_its_files(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    cls = type(loading.load_tokenizer(str(folder)))
    wanted = loading.load_tokenizer(str(folder))(CAPTIONS)["input_ids"]
    for name in (cls.__name__, f"{cls.__name__}Fast", None):
        named(folder, name)
        tokenizer = loading.load_tokenizer(str(folder))
        assert type(tokenizer) is cls
        assert tokenizer(CAPTIONS)["input_ids"] == wanted
    (folder / "tokenizer_config.json").unlink()
    assert loading.load_tokenizer(str(folder))(CAPTIONS)["input_ids"] == wanted


def test_clips_first_tokenizers_are_a_vocabulary_and_merges(clip: Path) -> None:
    wanted = loading.load_tokenizer(str(clip))(CAPTIONS)["input_ids"]
    model = json.loads((clip / "tokenizer.json").read_text())["model"]
    (clip / "tokenizer.json").unlink()
    (clip / "vocab.json").write_text(json.dumps(model["vocab"]))
    (clip / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
    assert loading.load_tokenizer(str(clip))(CAPTIONS)["input_ids"] == wanted


def test_siglip_reads_its_pieces_though_a_tokenizer_json_lies_beside_them(siglip: Path) -> None:
    """As in the published folders, where the two differ in punctuation and capitals."""
    tokenizer = loading.load_tokenizer(str(siglip))
    wanted = tokenizer([*CAPTIONS, "A DOG!"])["input_ids"]
    pieces = tokenizer.sp_model
    scores = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    fast = Tokenizer(models.Unigram(scores, unk_id=pieces.unk_id()))
    fast.add_special_tokens(["</s>", "<unk>"])
    fast.save(str(siglip / "tokenizer.json"))
    assert loading.load_tokenizer(str(siglip))([*CAPTIONS, "A DOG!"])["input_ids"] == wanted
    assert fast.encode("A DOG!").ids != wanted[-1][:-1], "or else this tests nothing"


def gemma(folder: Path) -> None:
    """Put a tokenizer like Gemma's in the place of SigLIP's, as SigLIP 2's folders have it."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE(fuse_unk=True, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    entries = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=entries, show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right", "model_max_length": 10**30}
    tokens = {f"{token[1:-1]}_token": token for token in special}
    named_class = {"tokenizer_class": "GemmaTokenizer", "model_input_names": ["input_ids"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(named_class | settings | tokens))
    (folder / "spiece.model").unlink()
    config = tiny_siglip().config
    config.text_config.vocab_size = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    type(tiny_siglip())(config).save_pretrained(folder)


def test_siglip_2_reads_gemmas_tokens_of_lower_case(siglip: Path, tmp_path: Path) -> None:
    gemma(siglip)
    loaded = loading.load_clip(str(siglip))
    lower = [caption.lower() for caption in CAPTIONS]
    theirs = AutoTokenizer.from_pretrained(siglip)
    assert type(theirs).__name__ == "GemmaTokenizer"
    wanted = theirs([*lower, ""], padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    assert torch.equal(loaded.tokenize([*CAPTIONS, ""]), wanted["input_ids"])
    loaded.save(tmp_path / "saved")
    saved = tmp_path / "saved"
    for reader in (loading.load_tokenizer(str(saved)), AutoTokenizer.from_pretrained(saved)):
        again = reader([*CAPTIONS, ""], padding="max_length", truncation=True, max_length=64, return_tensors="pt")
        assert set(again) == {"input_ids"}, "a mask would hide the padding that SigLIP was trained to see"
        assert torch.equal(again["input_ids"], wanted["input_ids"])


def test_other_tokenizers_and_their_code_are_refused(clip: Path) -> None:
    named(clip, "EvilTokenizer")
    settings = json.loads((clip / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
    (clip / "tokenizer_config.json").write_text(json.dumps(settings))
    (clip / "evil.py").write_text("raise SystemExit('code was run')")
    refused(clip, "is of class EvilTokenizer")
    named(clip, "CLIPTokenizer")
    loading.load_clip(str(clip))


def test_a_tokenizer_without_the_file_of_its_class_is_named(siglip: Path, clip: Path) -> None:
    shutil.copy(clip / "tokenizer.json", siglip)
    (siglip / "spiece.model").unlink()
    refused(siglip, r"The SiglipTokenizer in .* lacks spiece\.model")
    (clip / "tokenizer.json").unlink()
    refused(clip, "has no tokenizer that Limner can use")


def test_what_siglip_needs_is_said_where_it_is_not_installed(siglip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as if it were not there
    refused(siglip, r"needs sentencepiece; install with: pip install 'limner\[train\]'")


# ---- how pixels are wanted


def test_a_clip_that_does_not_say_wants_its_pixels_as_the_first_of_its_kind(clip: Path, siglip: Path) -> None:
    assert loading.load_clip(str(clip)).normalisation == clips.OPENAI
    assert loading.load_clip(str(siglip)).normalisation == {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (clip / "preprocessor_config.json").write_text('{"image_mean": [0, 0.5, 1]}')
    assert loading.load_clip(str(clip)).normalisation == {**clips.OPENAI, "image_mean": [0, 0.5, 1]}


def test_what_a_processor_of_transformers_5_saved_is_read(clip: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    wanted = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (clip / "preprocessor_config.json").write_text(json.dumps(wanted | {"image_processor_type": "CLIPImageProcessor"}))
    AutoProcessor.from_pretrained(clip).save_pretrained(tmp_path / "saved")
    shutil.copy(clip / "config.json", tmp_path / "saved")
    assert not (tmp_path / "saved" / "preprocessor_config.json").exists(), "or else this tests nothing"
    assert_close(loading.read_normalisation(tmp_path / "saved"), wanted)


@pytest.mark.parametrize("values", [[0.5, 0.5], [0.5] * 4, ["0.5"] * 3, [0.5, None, 0.5], 0.5, "0.5", None, {}, []])
@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_a_normalisation_that_is_not_three_numbers_is_refused(clip: Path, name: str, values: Any) -> None:
    (clip / "preprocessor_config.json").write_text(json.dumps({name: values}))
    refused(clip, f"The {name} of the CLIP in .* is not three numbers")


# ---- damage


def refused(folder: Path, match: str, load: Callable[[str], Any] = loading.load_clip) -> None:
    """What lies in `folder` is refused in one sentence that names it."""
    with pytest.raises(ModelError, match=match) as caught:
        load(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((".", "'"))


def changed(folder: Path, **settings: Any) -> None:
    """Put other settings into the config of a part; `vision_config` and `text_config` are added to."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in settings.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights of a part."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"the weights pytorch_model\.bin only as a pickle",
    ),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "can't be read"),
    "a weight less": (lambda f: with_weights(f, lambda w: w.pop("logit_scale")), "lacks the weight logit_scale"),
    "a weight of another shape": (
        lambda f: with_weights(f, lambda w: w.update({"logit_scale": torch.zeros(7)})),
        r"The weight logit_scale of the CLIP in .* is of shape \(7,\), but its config\.json says \((1,)?\)",
    ),
    "fewer entries": (
        lambda f: changed(f, text_config={"vocab_size": 7}),
        r"The weight text_model\.embeddings\.token_embedding\.weight .* but its config\.json says \(7, ",
    ),
    "another class": (
        lambda f: changed(f, architectures=["BertModel"]),
        r"no CLIP that Limner can use \(it is of class BertModel\)",
    ),
    "half a config": (lambda f: (f / "config.json").write_text("{"), r"config\.json can't be read"),
    "a list as config": (lambda f: (f / "config.json").write_text("[]"), r"config\.json does not hold settings"),
    "two sides": (lambda f: changed(f, vision_config={"image_size": [16, 16]}), "The CLIP in .* can't be read"),
    "a side in words": (lambda f: changed(f, vision_config={"image_size": "16"}), "image_size.*expected int, got str"),
    "odd heads": (lambda f: changed(f, text_config={"num_attention_heads": 5}), r"attention heads|num_heads.*5"),
    "half a tokenizer_config": (
        lambda f: (f / "tokenizer_config.json").write_text("{"),
        r"tokenizer_config\.json can't be read",
    ),
    "half a preprocessor_config": (
        lambda f: (f / "preprocessor_config.json").write_text("{"),
        r"preprocessor_config\.json can't be read",
    ),
    "a list as preprocessor_config": (
        lambda f: (f / "preprocessor_config.json").write_text("[]"),
        r"preprocessor_config\.json does not hold settings by name",
    ),
    "bytes as preprocessor_config": (
        lambda f: (f / "preprocessor_config.json").write_bytes(b"\xff"),
        r"preprocessor_config\.json can't be read",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_spoilt_clip_is_refused(kind: str, how: str, request: pytest.FixtureRequest) -> None:
    folder, (spoil, match) = request.getfixturevalue(kind), SPOILT[how]
    spoil(folder)
    refused(folder, match)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"added_tokens": [], "model": {"merges": [["a", "b"]]}}'])
def test_a_spoilt_tokenizer_is_refused(clip: Path, content: str) -> None:
    (clip / "tokenizer.json").write_text(content)
    refused(clip, "The tokenizer in .* can't be read")


@pytest.mark.parametrize("content", [b"", b"pieces", None])
def test_a_spoilt_sentencepiece_model_is_refused(siglip: Path, content: bytes | None) -> None:
    file = siglip / "spiece.model"
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    refused(siglip, "The tokenizer in .* can't be read")


def test_a_tokenizer_of_another_clip_is_refused(clip: Path) -> None:
    clips.new_tokenizer([*CAPTIONS, "something else altogether"], 610).save_pretrained(clip)
    refused(clip, "has 610 entries, but its text tower reads 600")


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    weights = load_file(file)
    del weights["decoder.conv_in.bias"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks the weight decoder\.conv_in\.bias"):
        loading.load_vae(str(tmp_path))


@pytest.mark.parametrize(
    ("original", "load", "weight"),
    [(tiny_vae, loading.load_vae, "quant_conv.bias"), (tiny_unet, loading.load_unet, "conv_in.bias")],
)
def test_a_weight_of_another_shape_is_named(
    tmp_path: Path, original: Callable[[], Any], load: Callable[[str], Any], weight: str
) -> None:
    original().save_pretrained(tmp_path)
    with_weights(tmp_path, lambda weights: weights.update({weight: torch.zeros(7)}))
    refused(tmp_path, rf"The weight {weight} of the .* is of shape \(7,\), but its config\.json says \(\d+,\)", load)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"VAE in .* can't be read"):
        loading.load_vae(str(tmp_path))


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae", safe_serialization=False)
    with pytest.raises(ModelError, match="only as a pickle"):
        loading.load_vae(str(tmp_path))


@pytest.mark.parametrize("name", ["EvilScheduler", "torch", "DiffusionPipeline", None, "UNet2DConditionModel"])
def test_only_schedulers_of_diffusers_are_loaded(tmp_path: Path, name: str | None) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ModelError, match="not one of Diffusers'"):
        loading.load_scheduler(str(tmp_path))


def test_the_libraries_say_nothing_and_speak_again_afterwards(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = (diffusers_logging, transformers_logging)
    before = [log.get_verbosity() for log in logs]
    capfd.readouterr()
    loading.load_text_encoder(str(model))
    assert capfd.readouterr() == ("", "")
    with loading.quiet():
        for log in logs:
            log.get_logger(log.__name__).warning("noise")
    assert capfd.readouterr() == ("", "")
    assert [log.get_verbosity() for log in logs] == before


def test_it_is_quiet_until_the_last_who_wanted_it_leaves() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    with ExitStack() as last:
        with ExitStack() as first:
            first.enter_context(loading.quiet())
            last.enter_context(loading.quiet())
        assert logging.get_verbosity() > before
    assert logging.get_verbosity() == before
