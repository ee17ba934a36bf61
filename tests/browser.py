"""A page in a real browser: Debian's Chromium, or Playwright's own, without a network; skips where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Opened:
    """A page with all its pictures, and what the browser said of it."""

    page: Any
    said: list[str]
    """Console messages, errors and failed requests."""

    @property
    def too_wide(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))

    @property
    def missing(self) -> list[str]:
        """The alternative texts of pictures that are not there."""
        script = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt)"
        return list(self.page.evaluate(script))


@contextmanager
def opened(file: Path, *, width: int, dark: bool = False) -> Iterator[Opened]:
    """Open a file in a window of that width, scrolled through to its end once."""
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        program = shutil.which("chromium") or (str(own) if own.is_file() else None)
        if program is None:
            pytest.skip("needs Chromium: the package of Debian, or `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        scheme = "dark" if dark else "light"
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(request.url[:80]))
        page.goto(file.resolve().as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        for top in range(0, page.evaluate("document.body.scrollHeight"), 700):
            page.evaluate(f"window.scrollTo(0, {top})")
            page.wait_for_timeout(15)
        yield Opened(page, said)
        browser.close()
