"""Servers that the tests of a module share, in every way that a queue is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from databases import postgres
from limner.models.clip import HALF, Clip
from serving import Queue, Server
from tiny import WIDTH, tiny_clip, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A PostgreSQL server."""
    if sys.platform != "linux":
        pytest.skip("PostgreSQL is started as Debian has it")
    with postgres() as url:
        yield url


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def queue(request: pytest.FixtureRequest) -> Queue:
    """One server with SQLite, or two that share a PostgreSQL."""
    return Queue(request.getfixturevalue("postgresql") if request.param == "postgresql" else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a CLIP that ranks pictures, and a report."""
    folder = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    Clip(tiny_clip(), tiny_tokenizer(folder / "clip"), HALF).save(folder / "clip")
    (folder / "report.html").write_text("<!DOCTYPE html><title>Report</title><p>It draws like a tiny model.</p>")
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for it."""
    file = tmp_path_factory.mktemp("lora") / "wild.safetensors"
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (2, WIDTH), "lora_B": (WIDTH, 2)}
    save_file({f"{layer}.{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}, file)
    return file


@pytest.fixture(scope="module")
def server(queue: Queue, folder: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of both."""
    with queue.serving(tmp_path_factory.mktemp("data") / "served", folder, "--lora", lora) as running:
        yield running
