"""CLIP and SigLIP: tokenizers lose no text, features are plain Transformers', which also reads a saved folder."""

from __future__ import annotations

import string
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close
from transformers import AutoProcessor, CLIPModel, CLIPTokenizer, SiglipModel
from transformers.models.siglip.tokenization_siglip import SiglipTokenizer

from limner.config import TrainClipConfig
from limner.data.pictures import load_pixels
from limner.errors import ConfigError
from limner.models import clip as clips
from limner.models.clip import Clip
from limner.settings import resolve
from photos import photo
from tiny import CAPTIONS, tiny_siglip, tiny_siglip_tokenizer

NAKED = 2 * 256 + 2  # entries of a tokenizer without merges
NORMALISATION = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
LONG = "dog " * 200

texts = st.one_of(
    st.sampled_from([*CAPTIONS, "", " ", LONG, "Grüße, 犬! 🐕", "A <|endoftext|> dog."]),
    st.text(st.characters(codec="utf-8"), max_size=120),
)
KINDS = pytest.mark.parametrize("kind", ["clip", "siglip"])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer that learned the captions."""
    return clips.new_tokenizer(CAPTIONS, 600)


@pytest.fixture(scope="module")
def clip() -> Clip:
    """A new CLIP for the captions, with a normalisation of its own."""
    sizes = {"width": 16, "layers": 2, "heads": 2, "features": 8, "size": 16, "patch": 8, "vocabulary": 600}
    torch.manual_seed(0)
    made = clips.new(resolve(TrainClipConfig, {"data": "d", "out": "o", **sizes}), CAPTIONS)
    return Clip(made.network.eval(), made.tokenizer, NORMALISATION)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """A SigLIP with a tokenizer for the captions, with a normalisation of its own."""
    return Clip(tiny_siglip(), tiny_siglip_tokenizer(tmp_path_factory.mktemp("siglip")), NORMALISATION)


@pytest.fixture(scope="module")
def either(clip: Clip, siglip: Clip) -> dict[str, Clip]:
    """Both, by kind."""
    return {"clip": clip, "siglip": siglip}


# ---- CLIP's tokenizer


def letters(text: str) -> str:
    """What a caption says, apart from case and white space, which CLIP's tokenizer is to lose."""
    lower = unicodedata.normalize("NFC", text).lower()  # after which marks may stand in another order
    return "".join(unicodedata.normalize("NFC", lower).split())


# Cn: letters of a newer Unicode than Python's, which it can't put into lower case, as the tokenizer can
KNOWN = st.characters(codec="utf-8", exclude_categories=["Cc", "Cn", "Zl", "Zp", "Zs"])


@given(st.text(KNOWN, max_size=60))
def test_any_text_comes_back_in_lower_case(text: str) -> None:
    tokenizer = clips.new_tokenizer(CAPTIONS, 600)
    ids = tokenizer(text)["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert letters(tokenizer.decode(ids[1:-1])) == letters(text)


def test_captions_come_back_word_by_word(tokenizer: Any) -> None:
    for caption in CAPTIONS:
        ids = tokenizer(caption)["input_ids"][1:-1]
        assert tokenizer.decode(ids).split() == caption.lower().replace(".", " .").split()


def test_common_words_are_few_tokens(tokenizer: Any) -> None:
    assert len(tokenizer("the dog")["input_ids"]) < len(tokenizer("xqz wvk")["input_ids"])
    assert tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"])[1] == "a</w>"


@pytest.mark.parametrize("size", [NAKED, NAKED + 1, 600, 4096])
def test_the_vocabulary_has_at_most_the_size_asked_for(size: int) -> None:
    tokenizer = clips.new_tokenizer(CAPTIONS, size)
    assert NAKED <= len(tokenizer) <= size
    assert len(tokenizer) == size or size == 4096, "where there are words enough, all of it is used"
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id} == {len(tokenizer) - 2, len(tokenizer) - 1}


@pytest.mark.parametrize("size", [1, NAKED - 1])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"vocabulary {size} is too small; .* {NAKED} entries"):
        clips.new_tokenizer(CAPTIONS, size)


def test_without_captions_there_are_bytes() -> None:
    assert len(clips.new_tokenizer([], 600)) == NAKED


def test_the_same_captions_make_the_same_tokenizer() -> None:
    made = {clips.new_tokenizer(CAPTIONS, 600).backend_tokenizer.to_str() for _ in range(5)}
    assert len(made) == 1, "or else a resumed training would read its captions differently"


# ---- token ids


def test_captions_are_cut_and_padded(clip: Clip, siglip: Clip) -> None:
    ids, tokenizer = clip.tokenize(["", "A dog.", LONG]), clip.tokenizer
    assert ids.shape == (3, 77)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert (ids[:, -1] == tokenizer.eos_token_id).all()
    assert siglip.tokenize(["", "A dog.", LONG]).shape == (3, 64)


def test_a_tokenizer_that_would_read_more_is_held_to_the_text_tower(siglip: Clip, tmp_path: Path) -> None:
    endless = tiny_siglip_tokenizer(tmp_path)
    endless.model_max_length = 10**30  # what a tokenizer without a limit says
    assert Clip(siglip.network, endless, NORMALISATION).tokenize([LONG]).shape == (1, 64)


def siglip_ids(pieces: SentencePieceProcessor, text: str, end: int) -> list[int]:
    """Ids as SigLIP was trained on them (Zhai et al. 2303.15343): no capitals, no ASCII punctuation, padded by ends."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    ids = pieces.encode(" ".join(plain.split()))[:63]
    return [*ids, *[end] * (64 - len(ids))]


@given(st.lists(texts.filter(lambda text: "</s>" not in text and "<unk>" not in text), min_size=1, max_size=3))
def test_siglip_reads_pieces_of_plain_lower_case(siglip: Clip, captions: list[str]) -> None:
    ids = siglip.tokenize(captions)
    for caption, row in zip(captions, ids.tolist(), strict=True):
        assert row == siglip_ids(siglip.tokenizer.sp_model, caption, siglip.tokenizer.eos_token_id)
    theirs = siglip.tokenizer(captions, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    assert torch.equal(ids, theirs["input_ids"])


@given(st.lists(texts, min_size=1, max_size=3))
def test_the_mask_is_the_text_with_begin_and_end(clip: Clip, siglip: Clip, captions: list[str]) -> None:
    rows = clip.tokenizer(captions, truncation=True, max_length=77)["input_ids"]
    lengths = [row.index(clip.tokenizer.eos_token_id) + 1 for row in rows]
    mask = clip.mask(clip.tokenize(captions))
    assert mask.tolist() == [[True] * length + [False] * (77 - length) for length in lengths]
    assert siglip.mask(siglip.tokenize(captions)).all(), "what follows the text is seen by all of it"


# ---- features and states


def reference(clip: Clip, captions: list[str]) -> Tensor:
    """Text features by Transformers alone."""
    length = clip.network.config.text_config.max_position_embeddings
    ids = clip.tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return normalize(clip.network.get_text_features(input_ids=ids["input_ids"]).pooler_output)


@KINDS
@settings(max_examples=40)
@given(captions=st.lists(texts, min_size=1, max_size=3))
@torch.no_grad()
def test_text_features_are_those_of_transformers_untrimmed(
    either: dict[str, Clip], kind: str, captions: list[str]
) -> None:
    clip = either[kind]
    assert_close(clip.text_features(clip.tokenize(captions)), reference(clip, captions), rtol=0, atol=2e-6)


@torch.no_grad()
def test_only_padding_that_all_share_is_trimmed_and_none_of_siglip(clip: Clip, siglip: Clip) -> None:
    captions = ["A dog.", "", *CAPTIONS[:3]]
    trimmed = clip.trimmed(clip.tokenize(captions))
    assert trimmed.shape == (5, max(len(clip.tokenizer(text)["input_ids"]) for text in captions))
    assert torch.equal(trimmed, clip.tokenize(captions)[:, : trimmed.shape[1]])
    for whole, ids in ((clip, clip.tokenize([LONG])), (siglip, siglip.tokenize(["", "A dog."]))):
        assert torch.equal(whole.trimmed(ids), ids)


@pytest.fixture(scope="module")
def old(clip: Clip) -> Clip:
    """The same as OpenAI's first configs have it: 2 as the end token, which means where the highest id stands."""
    config = clip.network.config.to_dict()
    config["text_config"]["eos_token_id"] = 2
    network = CLIPModel(type(clip.network.config)(**config)).eval()
    network.load_state_dict(clip.network.state_dict())
    assert network.text_model.eos_token_id == 2 != clip.tokenizer.eos_token_id == 599
    return Clip(network, clip.tokenizer, NORMALISATION)


@settings(max_examples=40)
@given(captions=st.lists(texts, min_size=1, max_size=3))
@torch.no_grad()
def test_a_clip_that_pools_at_the_highest_id_has_the_same_features(clip: Clip, old: Clip, captions: list[str]) -> None:
    features = old.text_features(old.tokenize(captions))
    assert_close(features, reference(old, captions), rtol=0, atol=2e-6)
    assert_close(features, clip.text_features(clip.tokenize(captions)), rtol=0, atol=2e-6)


@KINDS
@torch.no_grad()
def test_image_features_are_those_of_transformers(either: dict[str, Clip], kind: str) -> None:
    clip = either[kind]
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    mean, std = (torch.tensor(NORMALISATION[name])[:, None, None] for name in ("image_mean", "image_std"))
    theirs = clip.network.get_image_features(pixel_values=((pixels + 1) / 2 - mean) / std).pooler_output
    ours = clip.image_features(pixels)
    assert_close(ours, normalize(theirs), rtol=0, atol=1e-5)
    assert_close(ours.norm(dim=1), torch.ones(3))


@torch.no_grad()
def test_a_share_of_the_patches_is_left_out(clip: Clip) -> None:
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1  # of 2x2 patches
    assert_close(clip.image_features(pixels, 0.01), clip.image_features(pixels))  # all, in another order
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        before = clip.image_features(pixels, 0.75)
        counted = []
        for patch in range(4):
            other = pixels.clone()
            other[..., patch // 2 * 8 :, patch % 2 * 8 :][..., :8, :8] *= -1
            torch.manual_seed(seed)
            if not torch.equal(clip.image_features(other, 0.75), before):
                counted.append(patch)
        assert len(counted) == 1
        seen |= set(counted)
    assert seen == {0, 1, 2, 3}


@KINDS
@torch.no_grad()
def test_features_of_a_network_in_half_the_bytes_are_of_unit_length(either: dict[str, Clip], kind: str) -> None:
    made = either[kind]
    half = Clip(type(made.network)(made.network.config).bfloat16(), made.tokenizer, NORMALISATION)
    for features in (half.text_features(half.tokenize(CAPTIONS)), half.image_features(torch.zeros(2, 3, 16, 16))):
        assert features.dtype == torch.float32
        assert_close(features.norm(dim=1), torch.ones(len(features)))


@KINDS
@torch.no_grad()
def test_token_states_are_those_of_the_last_two_layers(either: dict[str, Clip], kind: str) -> None:
    clip = either[kind]
    ids, tower = clip.tokenize(CAPTIONS[:2]), clip.network.text_model
    seen: list[Tensor] = []
    with tower.encoder.layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        out = tower(input_ids=ids, output_hidden_states=True)
    last, before = clip.token_states(ids)
    assert torch.equal(last, out.last_hidden_state)
    assert torch.equal(before, out.hidden_states[-2])
    assert torch.equal(before, seen[0]), "what the last layer reads"
    assert last.shape == before.shape == (2, ids.shape[1], 16)
    assert not torch.equal(last, before)


@settings(max_examples=40)
@given(captions=st.lists(texts, min_size=1, max_size=3))
@torch.no_grad()
def test_token_states_of_trimmed_ids_are_the_same(clip: Clip, captions: list[str]) -> None:
    ids = clip.tokenize(captions)
    short = clip.trimmed(ids)
    for kept, whole in zip(clip.token_states(short), clip.token_states(ids), strict=True):
        assert_close(kept, whole[:, : short.shape[1]], rtol=0, atol=1e-5)


# ---- the folder

PLAIN = {"clip": (CLIPModel, CLIPTokenizer), "siglip": (SiglipModel, SiglipTokenizer)}


@KINDS
@torch.no_grad()
def test_plain_transformers_reads_the_folder(tmp_path: Path, either: dict[str, Clip], kind: str) -> None:
    clip, (model, reader) = either[kind], PLAIN[kind]
    clip.save(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix in {".bin", ".pt", ".pkl"}]
    network, tokenizer = model.from_pretrained(tmp_path).eval(), reader.from_pretrained(tmp_path)
    captions = [*CAPTIONS, "", "Grüße, 犬! 🐕", LONG]
    ids = clip.tokenize(captions)
    kept = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    assert torch.equal(tokenizer(captions, **kept)["input_ids"], ids)
    assert_close(normalize(network.get_text_features(ids).pooler_output), clip.text_features(ids), rtol=0, atol=2e-6)


@KINDS
@torch.no_grad()
def test_a_processor_out_of_the_folder_gives_the_same_features(
    tmp_path: Path, either: dict[str, Clip], kind: str
) -> None:
    """Text and pictures the way that Transformers' guides read them."""
    clip, (model, _) = either[kind], PLAIN[kind]
    clip.save(tmp_path)
    network, processor = model.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    sides = [(16, 16, 1e-5), (40, 40, 0.1)]  # one of the right size has nothing to resize: every value must agree
    sides += [(40, 24, 0.1)] if kind == "clip" else []  # SigLIP's squeezes what is no square, where we cut
    for number, (width, height, tolerance) in enumerate(sides):
        image = photo(number, width, height)
        image.save(tmp_path / "picture.png")
        inputs = processor(text=CAPTIONS, images=image, padding="max_length", truncation=True, return_tensors="pt")
        pixels = load_pixels(tmp_path / "picture.png", clip.size)[None]
        values = clips.normalised(pixels, NORMALISATION)
        assert inputs["pixel_values"].shape == values.shape
        assert (inputs["pixel_values"] - values).abs().mean() < tolerance
        theirs = network(**inputs)
        assert_close(theirs.text_embeds, clip.text_features(clip.tokenize(CAPTIONS)), rtol=0, atol=1e-5)
        assert (theirs.image_embeds @ clip.image_features(pixels).T).item() > 1 - tolerance


def test_normalised_against_numpy() -> None:
    array = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 4)).astype(np.float32)
    mean, std = (np.array(NORMALISATION[name])[:, None, None] for name in ("image_mean", "image_std"))
    wanted = ((array + 1) / 2 - mean) / std
    assert_close(clips.normalised(torch.from_numpy(array), NORMALISATION), torch.from_numpy(wanted).float())
