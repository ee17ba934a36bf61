"""Prompts: read whole, refused when empty, and cut into pieces without losing a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limner.errors import ConfigError
from limner.generation import prompts as texts
from tiny import tiny_tokenizer

LENGTH = 77


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that has tokens for any text."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@given(st.lists(st.integers(0, 600), max_size=400), st.integers(3, 100))
def test_pieces_hold_every_token_in_order_and_fit(ids: list[int], length: int) -> None:
    pieces = texts.chunks(ids, length)
    assert [token for piece in pieces for token in piece] == ids
    assert all(len(piece) == length - 2 for piece in pieces[:-1]), "only the last piece may have room left"
    assert len(pieces[-1]) <= length - 2
    assert len(pieces) == max(1, -(-len(ids) // (length - 2)))


@given(text=st.text(max_size=300))
def test_framed_pieces_hold_what_the_tokenizer_said(tokenizer: Any, text: str) -> None:
    ids = texts.token_ids(tokenizer, text)
    rows, masks = texts.framed(texts.chunks(ids, LENGTH), tokenizer, LENGTH)
    kept = [[token for token, seen in zip(row, mask) if seen] for row, mask in zip(rows, masks)]
    assert all(len(row) == len(mask) == LENGTH for row, mask in zip(rows, masks))
    assert all((row[0], row[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) for row in kept)
    assert [token for row in kept for token in row[1:-1]] == ids


@pytest.mark.parametrize("text", ["", "A dog.", "a " * 75, "Ein Hünd auf dem Éis; 犬"])
def test_a_prompt_that_fits_is_framed_as_the_tokenizer_frames_it(tokenizer: Any, text: str) -> None:
    theirs = tokenizer(text, padding="max_length", max_length=LENGTH, truncation=True)
    rows, masks = texts.framed(texts.chunks(texts.token_ids(tokenizer, text), LENGTH), tokenizer, LENGTH)
    assert rows == [theirs["input_ids"]]
    assert masks == [theirs["attention_mask"]]


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"A dog.\nA cat.\n", ["A dog.", "A cat."]),
        (b"\xef\xbb\xbfA dog.\r\n\r\n  A cat. ", ["A dog.", "A cat."]),
        ("Ein Hünd.\u2028Neu.".encode(), ["Ein Hünd.\u2028Neu."]),  # only line feeds part prompts
    ],
)
def test_a_file_has_one_prompt_a_line(tmp_path: Path, content: bytes, prompts: list[str]) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    assert texts.from_file(tmp_path / "prompts.txt") == prompts


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "has no prompts"),
        (b" \n\n", "has no prompts"),
        (b"d\xf6g", "not UTF-8"),
        (b"A\0dog.", "null character"),
        (b"dog " * 2_501, "has 10003 characters, and 10000 are read"),
    ],
)
def test_a_file_without_readable_prompts_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        texts.from_file(tmp_path / "prompts.txt")


def test_a_file_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MOST_BYTES", 10**6)
    with pytest.raises(ConfigError, match="has more than 1 MB of prompts"):
        texts.from_file(Path("/dev/zero"))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ConfigError, match="can't be read"):
            texts.from_file(place)


@pytest.mark.parametrize("prompt", ["", "  \n\t", "\udce4", "a\0b"])
def test_prompts_that_are_no_text_are_refused(prompt: str) -> None:
    with pytest.raises(ConfigError):
        texts.checked(prompt)


def test_a_negative_prompt_may_be_empty() -> None:
    assert texts.checked_negative("  ") == ""
    with pytest.raises(ConfigError, match="negative prompt"):
        texts.checked_negative("\udce4")
