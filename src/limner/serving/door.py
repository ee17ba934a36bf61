"""The way to the page, which opens once the server draws: Gradio takes seconds to load, and programs need not wait."""

from __future__ import annotations

import asyncio
import logging
import threading
from asyncio import Future
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route

from limner.serving.service import Service

log = logging.getLogger("limner.serve")

PATH = "/page"
LOOK = 0.05  # seconds between looks whether the server draws
PLAIN = (  # a page of one sentence, which comes behind it
    '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Limner</title>'
    '<meta name="color-scheme" content="light dark"><p style="font-family: system-ui; margin: 3em">'
)
ICON = (  # a picture in its frame
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#0d9488"/>'
    '<path d="M3 12l3-5 2.5 3.5L10 9l3 3z" fill="white"/></svg>'
)


def add(app: FastAPI) -> None:
    """Lead people from / to the page, and let those who come early wait."""

    @app.get("/", include_in_schema=False)
    def to_the_page() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/")

    @app.get(f"{PATH}/", include_in_schema=False)
    def wait() -> HTMLResponse:
        return HTMLResponse(PLAIN + "Limner is starting.", headers={"Cache-Control": "no-store", "Refresh": "1"})

    @app.get("/favicon.ico", include_in_schema=False)
    def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")

    @app.get("/manifest.json", include_in_schema=False)  # where Gradio's page looks for it
    def to_the_manifest() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/manifest.json")


@asynccontextmanager
async def opening(app: FastAPI, service: Service) -> AsyncIterator[None]:
    """Open the page while the server runs; where Gradio is not installed there is none."""
    if find_spec("gradio") is None:
        log.warning("no page: gradio is missing; pip install 'limner[serve]' brings it")
        yield
        return
    add(app)
    ending: Future[None] = asyncio.get_running_loop().create_future()
    page = asyncio.create_task(_open(app, service, ending))
    yield
    ending.set_result(None)
    await page


async def _open(app: FastAPI, service: Service, ending: Future[None]) -> None:
    """Load the page, put it at `PATH`, and keep it going until the end, which may come before it is there."""
    while not service.worker.ready and not ending.done():
        await asyncio.sleep(LOOK)
    loaded: Future[FastAPI | None] = asyncio.get_running_loop().create_future()
    threading.Thread(target=_load, args=(service, loaded), daemon=True).start()
    either: set[Future[Any]] = {loaded, ending}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if ending.done():
        return
    inner = loaded.result()
    if inner is None:
        app.router.routes.insert(0, Route(f"{PATH}/", _no_page))
        return
    async with inner.router.lifespan_context(inner):
        app.router.routes.insert(0, Mount(PATH, inner.routes[-1].app))  # type: ignore[attr-defined]
        await ending


def _no_page(_: Request) -> Response:
    return HTMLResponse(PLAIN + "The page can't be opened; the server's log says why. Programs can draw.", 503)


def _load(service: Service, loaded: Future[FastAPI | None]) -> None:
    application = None
    try:
        from limner.serving import page

        application = page.application(service, PATH)
    except Exception:  # programs can do without
        log.exception("the page can't be opened")
    with suppress(RuntimeError):  # the server has ended meanwhile
        loaded.get_loop().call_soon_threadsafe(loaded.set_result, application)
