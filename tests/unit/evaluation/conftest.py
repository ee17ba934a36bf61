"""A tiny CLIP and a tiny SigLIP, as every stage hands them on."""

from __future__ import annotations

import pytest
import torch

from limner.models.clip import HALF, Clip
from tiny import tiny_clip, tiny_siglip, tiny_siglip_tokenizer, tiny_tokenizer


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """A CLIP of random weights, its matrices ten times as large as is usual, so that features differ clearly."""
    network = tiny_clip()
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)
    return Clip(network, tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")), HALF)


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """A SigLIP of random weights, whose text tower sees all tokens and reads 64."""
    return Clip(tiny_siglip(), tiny_siglip_tokenizer(tmp_path_factory.mktemp("siglip")), HALF)
