"""Features and token states in batches are those of each caption and picture by itself, in the order given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from limner.data.dataset import Record
from limner.data.pictures import load_pixels
from limner.errors import DataError
from limner.evaluation.features import caption_features, caption_states, captions_of, picture_features
from limner.models.clip import Clip
from photos import jpeg, put
from tiny import CAPTIONS, WIDTH

TEXTS = [
    "A dog.",
    "dog " * 100,
    *CAPTIONS,
    "",
    "A dog.",
    "A man in a red jacket climbs a rock, then another, and more.",
]
BATCHES = pytest.mark.parametrize("batch_size", [1, 3, 100])


def test_captions_know_their_pictures() -> None:
    records = [Record(Path(str(k)), captions) for k, captions in enumerate([("a", "b"), (), ("c",)])]
    captions, owners = captions_of(records)
    assert captions == ["a", "b", "c"]
    assert owners.tolist() == [0, 0, 2]
    assert captions_of([])[1].dtype == torch.long


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@BATCHES
def test_captions_in_batches(kind: str, batch_size: int, request: pytest.FixtureRequest) -> None:
    clip: Clip = request.getfixturevalue(kind)
    features = caption_features(clip, TEXTS, batch_size)
    with torch.no_grad():
        alone = torch.cat([clip.text_features(clip.tokenize([text])) for text in TEXTS])
    assert_close(features, alone, rtol=0, atol=1e-5)
    assert not features.requires_grad
    assert (alone[0] - alone[2]).abs().max() > 1e-3, "or else any order would do"
    assert torch.equal(features[TEXTS.index("A dog.")], features[len(TEXTS) - 2]), "the same caption, to the last bit"


@BATCHES
def test_pictures_in_batches(clip: Clip, batch_size: int, tmp_path: Path) -> None:
    put(tmp_path, {f"{number}.jpg": jpeg(number) for number in range(5)})
    paths = [tmp_path / f"{number}.jpg" for number in (3, 0, 4, 1, 2)]
    features = picture_features(clip, paths, batch_size)
    with torch.no_grad():
        alone = torch.cat([clip.image_features(load_pixels(path, clip.size)[None]) for path in paths])
    assert_close(features, alone, rtol=0, atol=1e-5)
    assert not features.requires_grad
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_a_picture_that_cannot_be_read_is_named(clip: Clip, tmp_path: Path) -> None:
    put(tmp_path, {"0.jpg": jpeg(0), "broken.jpg": b"no picture"})
    with pytest.raises(DataError, match=r"broken\.jpg"):
        picture_features(clip, sorted(tmp_path.iterdir()), 2)


@BATCHES
def test_states_in_batches(clip: Clip, batch_size: int) -> None:
    *layers, mask = caption_states(clip, TEXTS, batch_size)
    with torch.no_grad():
        wanted = clip.token_states(clip.tokenize(TEXTS))
    for layer, whole in zip(layers, wanted):
        assert layer.shape == (len(TEXTS), 77, WIDTH)
        assert_close(layer[mask], whole[mask], rtol=0, atol=1e-3)
        assert not layer.requires_grad
    assert (wanted[0] - wanted[1]).abs().max() > 0.1, "or else the layers could be swapped"


def test_the_mask_is_that_of_the_tokenizer(clip: Clip) -> None:
    theirs = clip.tokenizer(TEXTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    assert torch.equal(caption_states(clip, TEXTS, 4)[2], theirs["attention_mask"].bool())


def test_states_are_no_longer_than_the_longest_caption(clip: Clip) -> None:
    last, penultimate, mask = caption_states(clip, ["A dog.", ""], 4)
    longest = len(clip.tokenizer("A dog.")["input_ids"])
    assert last.shape == penultimate.shape == (2, longest, WIDTH)
    assert mask.sum(dim=1).tolist() == [longest, 2]


def test_all_tokens_of_a_siglip_count(siglip: Clip) -> None:
    *layers, mask = caption_states(siglip, TEXTS, 4)
    with torch.no_grad():
        wanted = siglip.token_states(siglip.tokenize(TEXTS))
    assert mask.shape == (len(TEXTS), 64)
    assert mask.all()
    for layer, whole in zip(layers, wanted):
        assert_close(layer, whole, rtol=0, atol=1e-4)
