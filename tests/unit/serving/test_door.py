"""What people are shown where the page can't be loaded."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("gradio", reason="the page needs gradio")
from starlette.testclient import TestClient

from limner import serving
from limner.config import ServeConfig
from limner.serving.app import create_app
from limner.serving.door import PATH
from limner.serving.service import Service
from tiny import tiny_model


def test_who_waits_for_a_page_that_can_t_be_loaded_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "limner.serving.page", None)  # importing it fails, also where another test has
    monkeypatch.delattr(serving, "page", raising=False)
    service = Service(ServeConfig(models=(str(tiny_model(tmp_path)),), out=tmp_path / "served", device="cpu"))
    with TestClient(create_app(service), base_url="http://localhost") as client:
        until = time.monotonic() + 60
        while "starting" in (answer := client.get(f"{PATH}/")).text:
            assert answer.headers["Refresh"] == "1", "it is asked again"
            assert time.monotonic() < until
            time.sleep(0.05)
    assert (answer.status_code, "the server's log says why" in answer.text) == (503, True)
    assert "Refresh" not in answer.headers
