"""Prompts: where they come from, and how long ones are cut into what the text encoder reads at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from limner.errors import ConfigError
from limner.generation import language
from limner.models import inversion

T = TypeVar("T")

MOST_CHARACTERS = 10_000  # of a prompt: a hundred times what anybody writes, and read at once
MOST_BYTES = 100_000_000  # of prompts


class Piece(NamedTuple):
    """Tokens that the text encoder reads at once, without those that mark begin and end."""

    ids: list[int]
    weights: list[float]
    """What the token states are multiplied with, one a token."""


def checked(prompt: str) -> str:
    """The prompt without white space around it. Raises ConfigError where it is empty or not text."""
    prompt = prompt.strip()
    if not prompt:
        raise ConfigError("A prompt is empty; say what to draw.")
    return _text(prompt, "The prompt")


def checked_negative(negative: str) -> str:
    """What a picture should not show, without white space around it; may be empty. Raises ConfigError."""
    return _text(negative.strip(), "The negative prompt")


def _text(text: str, what: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{what} {ascii(text)[:80]} is not valid UTF-8; write it again.") from None
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(
            f"{what} {text[:40]!r}... has {len(text)} characters, and {MOST_CHARACTERS} are read; shorten it."
        )
    if "\0" in text:
        raise ConfigError(f"{what} {ascii(text)[:80]} has a null character in it; take it out.")
    return text


def from_lines(text: str) -> list[str]:
    """One prompt a line; blank lines are skipped. Raises ConfigError."""
    return [checked(line) for line in text.split("\n") if line.strip()]


def from_file(file: Path) -> list[str]:
    """The prompts of a UTF-8 file, one a line. Raises ConfigError where it can't be read or has none."""
    try:
        with file.open("rb") as opened:
            prompts = from_lines(_decoded(opened, f"The prompts file {file}"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"The prompts file {file} can't be read ({reason}).") from None
    if not prompts:
        raise ConfigError(f"The prompts file {file} has no prompts; write one a line.")
    return prompts


def from_stdin() -> list[str]:
    """The prompts that are piped in, one a line; none where nothing is. Raises ConfigError where they are not UTF-8."""
    try:
        return from_lines(_decoded(sys.stdin.buffer, "Standard input"))
    except UnicodeDecodeError:
        raise ConfigError("The prompts on standard input are not UTF-8; convert them.") from None


def _decoded(stream: BinaryIO, what: str) -> str:
    """All text of a stream. Raises ConfigError where there is too much, UnicodeDecodeError where it is none."""
    data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{what} has more than {MOST_BYTES // 10**6} MB of prompts; take fewer.")
    return data.decode("utf-8-sig")


def length_of(text_encoder: Any, tokenizer: Any) -> int:
    """Tokens that the text encoder reads at once, 77 for CLIP, with the one before and the one after the text."""
    return int(min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, however long, without those that mark its begin and end.

    A token that textual inversion added in several vectors becomes as many, as `models.inversion` names them.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return inversion.spread(tokenizer, ids)


def chunks(ids: Sequence[T], length: int) -> list[list[T]]:
    """Tokens, or their weights, in order, `length - 2` a piece, so that begin and end fit around each.

    No tokens make one empty piece.
    """
    room = length - 2
    return [list(ids[i : i + room]) for i in range(0, max(len(ids), 1), room)]


def plain(tokenizer: Any, text: str, length: int) -> list[Piece]:
    """The pieces of a caption, every character of which is itself."""
    return [Piece(ids, [1.0] * len(ids)) for ids in chunks(token_ids(tokenizer, text), length)]


def weighted(tokenizer: Any, prompt: str, length: int) -> list[Piece]:
    """The pieces of a prompt in the notation of `language`. Raises ConfigError as `language.parse`."""
    pieces = []
    for part in language.parse(prompt):
        cut = [(token_ids(tokenizer, span.text), span.weight) for span in part]
        ids = [token for own, _ in cut for token in own]
        weights = [weight for own, weight in cut for _ in own]
        pieces += [Piece(*both) for both in zip(chunks(ids, length), chunks(weights, length))]
    return pieces


def framed(pieces: Sequence[Sequence[int]], tokenizer: Any, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Each piece between begin and end token, padded to `length`; and a mask that is 0 on the padding."""
    rows = [[tokenizer.bos_token_id, *piece, tokenizer.eos_token_id] for piece in pieces]
    pad = tokenizer.pad_token_id
    return (
        [row + [pad] * (length - len(row)) for row in rows],
        [[1] * len(row) + [0] * (length - len(row)) for row in rows],
    )
