"""A new CLIP: its tokenizer loses no text, its features don't see padding, and plain Transformers reads its folder."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import CLIPModel, CLIPTokenizer

from limner.config import TrainClipConfig
from limner.data.pictures import load_pixels
from limner.errors import ConfigError, ModelError
from limner.models import clip as clips
from limner.settings import resolve
from photos import photo
from tiny import CAPTIONS

NAKED = 2 * 256 + 2  # entries of a tokenizer without merges
NORMALISATION = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer that learned the captions."""
    return clips.new_tokenizer(CAPTIONS, 600)


@pytest.fixture(scope="module")
def clip(tokenizer: Any) -> Any:
    """A new CLIP for it."""
    settings = {"width": 16, "layers": 2, "heads": 2, "features": 8, "size": 16, "patch": 8}
    torch.manual_seed(0)
    return clips.new(resolve(TrainClipConfig, {"data": "d", "out": "o", **settings}), tokenizer).eval()


# ---- the tokenizer


def letters(text: str) -> str:
    """What a caption says, apart from case and white space, which CLIP's tokenizer is to lose."""
    return "".join(unicodedata.normalize("NFC", text).lower().split())


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp", "Zs"]), max_size=60))
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


def test_without_captions_there_are_bytes(tokenizer: Any) -> None:
    assert len(clips.new_tokenizer([], 600)) == NAKED


def test_the_same_captions_make_the_same_tokenizer() -> None:
    made = {clips.new_tokenizer(CAPTIONS, 600).backend_tokenizer.to_str() for _ in range(5)}
    assert len(made) == 1, "or else a resumed training would read its captions differently"


def test_captions_are_cut_and_padded(tokenizer: Any) -> None:
    for caption in ("", "A dog.", "dog " * 200):
        ids = clips.tokenize(tokenizer, caption)
        assert ids.shape == (77,)
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id


# ---- features


@torch.no_grad()
def test_padding_that_all_share_changes_no_feature(clip: Any, tokenizer: Any) -> None:
    texts = ["A dog.", "", *CAPTIONS[:3]]
    ids = torch.stack([clips.tokenize(tokenizer, text) for text in texts])
    trimmed = clips.trimmed(ids, tokenizer.eos_token_id)
    assert trimmed.shape[1] == max(len(tokenizer(text)["input_ids"]) for text in texts) < 77
    one, other = (clip.get_text_features(given).pooler_output for given in (ids, trimmed))
    assert_close(one, other, rtol=0, atol=1e-6)
    full = torch.stack([clips.tokenize(tokenizer, "dog " * 200)])
    assert torch.equal(clips.trimmed(full, tokenizer.eos_token_id), full)


# ---- the folder


@torch.no_grad()
def test_plain_transformers_reads_the_folder(tmp_path: Path, clip: Any, tokenizer: Any) -> None:
    clips.save(clip, tokenizer, NORMALISATION, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix in {".bin", ".pt", ".pkl"}]
    model, reader = CLIPModel.from_pretrained(tmp_path).eval(), CLIPTokenizer.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 16, 16)
    for text in (*CAPTIONS, "Grüße, 犬! 🐕", "dog " * 100):
        ours = clips.tokenize(tokenizer, text)
        theirs = reader(text, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        assert torch.equal(theirs[0], ours)
        one, other = (m(input_ids=theirs, pixel_values=pixels) for m in (clip, model))
        assert torch.equal(one.text_embeds, other.text_embeds)
        assert torch.equal(one.logits_per_image, other.logits_per_image)


def test_normalise_does_what_the_preprocessor_says(tmp_path: Path, clip: Any, tokenizer: Any) -> None:
    processing = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    clips.save(clip, tokenizer, NORMALISATION, tmp_path)
    assert clips.read_normalisation(tmp_path) == NORMALISATION
    processor = processing.CLIPImageProcessorPil.from_pretrained(tmp_path)
    # A picture of the right size has nothing to resize: every value must agree.
    for (width, height), tolerance in (((16, 16), 1e-5), ((40, 24), 0.1)):
        image = photo(0, width, height)
        image.save(tmp_path / "picture.png")
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        ours = clips.normalise(load_pixels(tmp_path / "picture.png", 16)[None], NORMALISATION)
        assert theirs.shape == ours.shape
        assert (theirs - ours).abs().mean() < tolerance


def test_normalise_against_numpy() -> None:
    array = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 4)).astype(np.float32)
    mean, std = (np.array(NORMALISATION[name])[:, None, None] for name in ("image_mean", "image_std"))
    wanted = ((array + 1) / 2 - mean) / std
    assert_close(clips.normalise(torch.from_numpy(array), NORMALISATION), torch.from_numpy(wanted).float())


def test_a_folder_without_a_preprocessor_means_openai(tmp_path: Path) -> None:
    assert clips.read_normalisation(tmp_path) == clips.OPENAI
    (tmp_path / clips.PREPROCESSOR).write_text(json.dumps({"image_mean": [0, 0, 0]}))
    assert clips.read_normalisation(tmp_path) == {**clips.OPENAI, "image_mean": [0, 0, 0]}


def test_a_damaged_preprocessor_is_named(tmp_path: Path) -> None:
    (tmp_path / clips.PREPROCESSOR).write_text("{")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json can't be read"):
        clips.read_normalisation(tmp_path)
