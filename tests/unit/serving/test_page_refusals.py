"""What the page says where the disk or a picture is not there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs gradio")
import gradio as gr
from fastapi import Request

from limner.config import ServeConfig
from limner.serving.access import Client
from limner.serving.page import Page
from limner.serving.schemas import JobRequest
from limner.serving.service import Service
from photos import encoded, photo
from tiny import tiny_model


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Of a server that draws nothing."""
    place = tmp_path_factory.mktemp("page")
    return Page(Service(ServeConfig(models=(str(tiny_model(place / "tiny")),), out=place / "served", device="cpu")))


def drawn(page: Page, **settings: Any) -> str:
    """What the page shows when a picture with these settings is asked for."""
    fields = page.controls.fields
    values = {control: control.value for control in fields.values()}
    values |= {fields[name]: value for name, value in settings.items()}
    request = gr.Request(Request({"type": "http", "client of limner": Client()}), session_hash="a")

    async def first() -> Any:
        return await anext(page._draw(values, request))

    return str(asyncio.run(first())[page.easel])


def test_a_disk_that_can_t_be_used_is_said(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(encoded(photo(1), "PNG"))
    page.service.uploads.folder.write_bytes(b"")  # no folder can be made there
    said = drawn(page, image=str(file))
    page.service.uploads.folder.unlink()
    assert "The server&#x27;s disk can&#x27;t be used (" in said
    assert str(tmp_path) not in said


def test_a_picture_whose_source_is_gone_can_t_be_used_again_and_that_is_said(page: Page) -> None:
    settings = JobRequest(prompt="A dog.", model="tiny", seed=1, size="16x16").model_dump()
    assert page._use(settings)[page.controls.seed] == "1"
    said = page._use(settings | {"image": "0" * 64})
    assert list(said) == [page.easel]
    assert "There is no picture 000000000000… here" in said[page.easel]
