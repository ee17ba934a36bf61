"""The page for people: it makes jobs as every client does, and shows them from the store.

Gradio draws it. Nothing in it asks another host: fonts are the system's, and analytics, sharing and the history that
Gradio would keep are off. Pictures come from /v1/images, behind the same gate as everything.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from limner.errors import UserError
from limner.serving import easel
from limner.serving.access import Client, client_of
from limner.serving.answers import no_disk
from limner.serving.controls import Controls, Update
from limner.serving.easel import Easel
from limner.serving.schemas import JobView
from limner.serving.service import Draining, Service
from limner.serving.store import QueueFull
from limner.serving.tables import OPEN

PACE = 0.15  # seconds between two looks of a job that is being drawn
IDLE = 0.1  # seconds between two looks for clicks
NEVER = 3600.0  # seconds between two looks for progress as Gradio tells it, which nothing here does
EARLIER = 40  # jobs whose pictures the gallery shows, and how many more "Show older" brings
ESCAPE = """() => document.addEventListener('keydown', event => {
    const closes = event.target.matches('[role=listbox]') || document.querySelector('#gallery .preview')
    if (event.key === 'Escape' && !closes) document.querySelector('#cancel:enabled')?.click()
})"""  # the key cancels, but where it closes a list or a large picture
UPLOADS_LAST = 24 * 3600  # seconds, in the folder of temporary files; what a job begins with is kept with the jobs


def application(service: Service, path: str) -> FastAPI:
    """An application that has nothing but the page, at `path`, as its last route."""
    app = FastAPI(openapi_url=None)
    blocks = Page(service).blocks
    # Gradio looks a thousand times a second whether somebody clicked, which costs a fifth of the rate of drawing
    blocks._queue.sleep_when_free, blocks._queue.progress_update_sleep_when_free = IDLE, NEVER
    gr.mount_gradio_app(
        app,
        blocks,
        path,
        footer_links=[],
        run_history=False,
        mcp_server=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        show_error=False,  # what people may read, the page says itself
        max_file_size=service.config.max_upload,
        theme=gr.themes.Base(
            primary_hue="teal",
            neutral_hue="stone",
            radius_size="md",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        css_paths=Path(__file__).with_name("page.css"),
    )
    # Open pages hold a stream, which would keep a server that is to end from doing so
    service.on_drain.append(app.routes[-1].app.stop_event.set)  # type: ignore[attr-defined]
    return app


class Page:
    """What the page consists of, and what happens on it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._followed: dict[str | None, str] = {}
        """The job that each open page, by its session, shows while it is drawn. (Where an event of Gradio's cancels
        another, the browser complains of a broken connection.)"""
        with gr.Blocks(
            title="Limner", analytics_enabled=False, fill_width=True, delete_cache=(3600, UPLOADS_LAST)
        ) as self.blocks:
            _html("<header><h1>Limner</h1><p>Say what you would like to see.</p></header>")
            with gr.Row(elem_id="studio"):
                with gr.Column(scale=2, min_width=300, elem_id="controls"):
                    self.controls = Controls(service)
                with gr.Column(scale=3, min_width=300):
                    self.easel = _html(easel.EMPTY, elem_id="easel")
            self._add_gallery()
            self._connect()

    # What there is

    def _add_gallery(self) -> None:
        self.job = gr.State("")
        self.jobs_shown = gr.State(EARLIER)
        self.pictures: Any = gr.State([])  # of the gallery, in its order: settings with the picture's own seed
        self.picked: Any = gr.State(None)
        with gr.Column(visible=False, elem_id="earlier") as self.earlier:
            _html("<h2>Earlier pictures</h2>")
            with gr.Row(visible=False, elem_id="picked") as self.details:
                self.facts = _html("", elem_id="facts")
                self.again = gr.Button("Use again", variant="secondary", elem_id="again", scale=0, min_width=140)
            self.gallery = gr.Gallery(
                show_label=False,
                columns=6,
                height="auto",
                object_fit="cover",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="gallery",
            )
            self.older = gr.Button("Show older", visible=False, variant="secondary", elem_id="older")

    def _connect(self) -> None:
        """Say what happens when. No event is an API of Gradio's: programs have /v1/jobs."""
        quiet: dict[str, Any] = {
            "api_visibility": "private",
            "show_progress": "hidden",
            "concurrency_limit": None,
        }
        controls = self.controls
        settings = set(controls.fields.values())
        followed = [self.easel, self.job, controls.begin, controls.cancel]
        known, listed = [self.jobs_shown, self.pictures], [self.earlier, self.gallery, self.pictures, self.older]
        loaded = self.blocks.load(self._resume, None, followed, **quiet)
        self.blocks.load(self._list, known, listed, **quiet)
        loaded.then(self._list, known, listed, **quiet)
        self.blocks.load(None, js=ESCAPE)
        drawn = gr.on(
            [controls.begin.click, controls.prompt.submit, controls.seed.submit, controls.negative.submit],
            self._draw,
            settings,  # as a set: one dictionary comes of them
            followed,
            trigger_mode="once",
            **quiet,
        )
        drawn.then(self._list, known, listed, **quiet)
        controls.cancel.click(self._cancel, self.job, None, **quiet)
        controls.model.input(controls.of_model, controls.model, controls.by_model, **quiet)
        self.gallery.select(self._pick, self.pictures, [self.picked, self.facts, self.details], **quiet)
        self.again.click(self._use, self.picked, [*settings, self.easel], **quiet).then(
            None, js="() => document.querySelector('#prompt textarea').focus()"
        )
        self.older.click(lambda shown: shown + EARLIER, self.jobs_shown, self.jobs_shown, **quiet).then(
            self._list, known, listed, **quiet
        )

    # What happens

    async def _draw(self, values: dict[Any, Any], request: gr.Request) -> AsyncIterator[Update]:
        """Make a job and follow it; say why where it can't be drawn."""
        try:
            asked = await run_in_threadpool(self.controls.asked, values)
            job = await run_in_threadpool(self.service.submit, asked, _client(request).owner)
        except (ValidationError, UserError, QueueFull, Draining, SQLAlchemyError, OSError) as error:
            self._followed.pop(request.session_hash, None)
            yield {self.easel: easel.refused(_sentence(error))}
            return
        async for update in self._follow(job.id, request):
            yield update

    async def _resume(self, request: gr.Request) -> AsyncIterator[Update]:
        """Show the newest job of whoever opens the page, and follow it if it has not ended."""
        newest = await run_in_threadpool(self.service.listed, _client(request).scope, limit=1)
        if newest and request.session_hash not in self._followed:  # who was quick has begun to draw
            async for update in self._follow(newest[0].id, request):
                yield update

    async def _follow(self, id_: str, request: gr.Request) -> AsyncIterator[Update]:
        """Show a job until it ends, or the page shows something else."""
        page, shown, told = request.session_hash, Easel(), 0.0
        self._followed[page] = id_
        try:
            async for event in self.service.follow(id_):
                if self._followed.get(page) != id_:
                    return
                if event.name == "preview":
                    shown.preview = event.data["jpeg"]
                    continue
                if event.name == "image":
                    shown.preview = None
                ended = event.name not in {"queued", "step", "image"}
                if not ended and time.monotonic() < told + PACE:
                    continue
                job = JobView(**event.data) if ended else await run_in_threadpool(self.service.get, id_)
                assert job is not None
                told, drawing = time.monotonic(), job.state in OPEN
                yield {
                    self.easel: shown.show(job),
                    self.job: id_,
                    self.controls.begin: _pressable(self.controls.begin, not drawing),
                    self.controls.cancel: _pressable(self.controls.cancel, drawing),
                }
        finally:
            if self._followed.get(page) == id_:
                del self._followed[page]

    def _cancel(self, id_: str, request: gr.Request) -> None:
        self.service.cancel(id_, _client(request).scope)

    def _list(self, count: int, before: list[dict[str, Any]], request: gr.Request) -> Update:
        """The gallery, of the newest `count` jobs with pictures.

        It is left alone, and what is picked in it, where it shows them already.
        """
        jobs = self.service.listed(_client(request).scope, drawn=True, limit=count)
        origin = f"{request.url.scheme}://{request.url.netloc}"
        pairs = [(job, image) for job in jobs for image in job.images]
        pictures = [self.controls.alone(job.settings, image) | {"id": image.id} for job, image in pairs]
        older = {self.older: gr.update(visible=len(jobs) == count)}
        if pictures == before:
            return older
        shown = [(origin + image.url, str(job.settings["prompt"])) for job, image in pairs]
        return older | {
            self.earlier: gr.update(visible=bool(pairs)),
            self.gallery: gr.update(value=shown, selected_index=None),
            self.pictures: pictures,
        }

    def _pick(self, pictures: list[dict[str, Any]], which: gr.SelectData) -> Update:
        """Show the settings of a picture of the gallery."""
        settings = pictures[which.index]
        return {self.picked: settings, self.facts: easel.facts(settings), self.details: gr.update(visible=True)}

    def _use(self, settings: dict[str, Any]) -> Update:
        """Put the settings of a picture where they can be changed; say why where what it began with is gone."""
        try:
            return self.controls.of_picture(settings)
        except (UserError, OSError) as error:
            return {self.easel: easel.refused(_sentence(error))}


def _client(request: gr.Request) -> Client:
    assert request.request is not None
    return client_of(request.request)


def _pressable(button: gr.Button, pressable: bool) -> Update:
    """Whether a button can be pressed; told without its words it would lose them in a page that was just opened."""
    return gr.update(value=button.value, interactive=pressable)


def _html(value: str, elem_id: str | None = None) -> gr.HTML:
    """A piece of the page that page.css alone styles."""
    return gr.HTML(value, elem_id=elem_id, apply_default_css=False)


def _sentence(error: Exception) -> str:
    """What a person is told of a refusal."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{str(first['loc'][0]).capitalize()}: {first['msg']}."
    if isinstance(error, SQLAlchemyError):
        return "The server's database does not answer; try again."
    if isinstance(error, OSError):
        return no_disk(error)
    return str(error) or "The server is about to end; try again in a moment."
