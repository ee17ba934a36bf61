"""Features and token states of many captions and pictures, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from limner.data.dataset import Record
from limner.data.pictures import load_pixels
from limner.evaluation.agreement import each_once
from limner.models.clip import Clip


def captions_of(records: Sequence[Record]) -> tuple[list[str], Tensor]:
    """Every caption, and the number in `records` of the picture that it belongs to -> M captions, owners (M,)."""
    captions = [caption for record in records for caption in record.captions]
    owners = [number for number, record in enumerate(records) for _ in record.captions]
    return captions, torch.tensor(owners, dtype=torch.long)


@torch.no_grad()
def caption_features(clip: Clip, captions: Sequence[str], batch_size: int) -> Tensor:
    """Features of unit length of one or more captions, in their order -> (M, E), on CPU.

    Each text is read once, so that repeated captions have the same features to the last bit, and tie.
    """
    texts, places = each_once(captions)
    batches = (clip.tokenize(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size))
    features = torch.cat([clip.text_features(ids.to(clip.network.device)).cpu() for ids in batches])  # (texts, E)
    return features[places]


@torch.no_grad()
def picture_features(clip: Clip, paths: Sequence[Path], batch_size: int) -> Tensor:
    """Features of unit length of the centre squares of one or more pictures -> (N, E), on CPU. Raises DataError."""
    parts = []
    for start in range(0, len(paths), batch_size):
        pixels = torch.stack([load_pixels(path, clip.size) for path in paths[start : start + batch_size]])
        parts.append(clip.image_features(pixels.to(clip.network.device)).cpu())  # (batch, E)
    return torch.cat(parts)


@torch.no_grad()
def caption_states(clip: Clip, captions: Sequence[str], batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token states of captions, of the last layer and of the one before, and which tokens are text.

    -> two of (M, L, D) and a mask (M, L), on CPU; L is the longest caption's length, 77 at most. The mask is true from
    the begin token to the end token; states behind that mean nothing. A SigLIP attends to its padding, so it counts.
    """
    ids = clip.trimmed(clip.tokenize(captions))  # (M, L)
    mask = clip.mask(ids)  # (M, L)
    states = torch.zeros(2, *ids.shape, clip.network.config.text_config.hidden_size)
    for rows in mask.sum(dim=1).argsort().split(batch_size):  # by length, as in `caption_features`
        parts = clip.token_states(clip.trimmed(ids[rows]).to(clip.network.device))
        for layer, part in zip(states, parts):  # (M, L, D), (batch, the batch's longest, D)
            layer[rows, : part.shape[1]] = part.float().cpu()
    return states[0], states[1], mask
