"""Textual inversion (Gal et al. 2208.01618): words that a text encoder learned, as vectors to add to its embedding.

Two layouts go round, in safetensors: Diffusers', one tensor named as its token, and that of A1111 and kohya's scripts,
one tensor named `emb_params`, whose token is the file's name. A token of several vectors takes as many places in a
prompt; the further ones are entered as `token_1`, `token_2`, ..., as Diffusers does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import AddedToken

from limner.errors import ConfigError, ModelError
from limner.models import loading

FILE = "learned_embeds.safetensors"  # as the scripts of Diffusers call it
IN_A1111 = "emb_params"


@dataclass(frozen=True)
class Inversion:
    """A file of learned vectors, and the token that means them in a prompt."""

    ref: str
    """What the user calls it: the file, or a folder that holds one."""
    file: Path
    name: str
    """Of the tensor in the file."""
    token: str


def find(text: str) -> Inversion:
    """The textual inversion that FILE or FILE:TOKEN means; without a token it is the file's own.

    Raises ModelError where there is none that can be read, ConfigError for a token that can't be written.
    """
    ref, _, token = text.rpartition(":")
    if not ref or Path(text).exists():
        ref, token = text, ""
    file = Path(ref) / FILE if (Path(ref) / FILE).is_file() else Path(ref)
    if not file.is_file():
        raise ModelError(f"There is no embedding {ref}; name a safetensors file, or a folder with {FILE}.")
    names = loading.tensor_names(file, "embedding")
    if len(names) != 1:
        what = f"{len(names)} tensors ({', '.join(sorted(names)[:3])})" if names else "nothing"
        raise ModelError(f"The embedding {file} holds {what} in place of one; choose one for Stable Diffusion 1 or 2.")
    token = token.strip() or (file.stem if names[0] == IN_A1111 else names[0].strip())
    if not token or not token.isprintable():
        raise ConfigError(f"The embedding {file} has the token {token!r}; name another, as {file.name}:TOKEN.")
    return Inversion(ref, file, names[0], token)


@torch.no_grad()
def add(inversions: Iterable[Inversion], tokenizer: Any, text_encoder: Any) -> None:
    """Add the tokens to a tokenizer, and their vectors to a CLIPTextModel, in place.

    Raises ModelError that names what doesn't fit: vectors of another width, a token that is there already.
    """
    for inversion in inversions:
        with safe_open(inversion.file, framework="pt") as opened:
            vectors = torch.atleast_2d(opened.get_tensor(inversion.name))  # (V, D)
        embedding = text_encoder.get_input_embeddings().weight
        rows, width = embedding.shape
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != width:
            raise ModelError(
                f"The embedding {inversion.file} is of shape {tuple(vectors.shape)}, and this model's text encoder is "
                f"{width} wide; choose one that was made for its kind."
            )
        names = [inversion.token, *(f"{inversion.token}_{i}" for i in range(1, len(vectors)))]
        if taken := _taken(names, tokenizer):
            raise ModelError(
                f"The token {taken} of {inversion.file} is in the vocabulary already; name another, as "
                f"{inversion.file.name}:TOKEN."
            )
        tokenizer.add_tokens([AddedToken(name, single_word=True) for name in names])
        text_encoder.resize_token_embeddings(max(rows, len(tokenizer)), mean_resizing=False)
        embedding = text_encoder.get_input_embeddings().weight
        embedding[tokenizer.convert_tokens_to_ids(names)] = vectors.to(embedding)


def _taken(names: Sequence[str], tokenizer: Any) -> str | None:
    """The name that is taken, or would pass for a further vector of another token, or have one; None where all fit."""
    added, base = tokenizer.get_added_vocab(), re.sub(r"_[0-9]+$", "", names[0])
    if base in added or f"{names[0]}_{len(names)}" in added:
        return names[0]
    return next((name for name in names if name in tokenizer.get_vocab()), None)


def spread(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Token ids, with all vectors of each added token in place of its first."""
    added = tokenizer.get_added_vocab()
    several = {number: name for name, number in added.items() if f"{name}_1" in added}
    spread_out = []
    for number in ids:
        spread_out.append(number)
        if number in several:
            following = (f"{several[number]}_{i}" for i in count(1))
            spread_out += [added[name] for name in takewhile(added.__contains__, following)]
    return spread_out
