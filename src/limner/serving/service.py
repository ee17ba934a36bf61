"""Everything that routes and page do with jobs, without HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from limner.config import ServeConfig
from limner.errors import ConfigError
from limner.generation import ranking
from limner.generation.jobs import Spec
from limner.serving.changes import Changes
from limner.serving.drawer import steps_of
from limner.serving.metrics import Metrics
from limner.serving.schemas import ImageView, JobRequest, JobView, own
from limner.serving.shelf import Shelf, read_loras, read_models, read_reports
from limner.serving.store import QueueFull, Store, new_id
from limner.serving.tables import OPEN, ImageRow, JobRow, State
from limner.serving.uploads import Uploads
from limner.serving.worker import POLL, Worker, shape_of, to_draw

log = logging.getLogger("limner.serve")


class UnknownModel(ConfigError):
    """A model that is not on the server's list."""


class Draining(Exception):
    """The server is about to end and accepts no more."""

    def __init__(self, job: str | None = None) -> None:
        known = f" Job {job} goes on when it is back." if job else ""
        super().__init__(f"The server is about to end; ask again in a moment.{known}")


@dataclass(frozen=True)
class Event:
    """What happened to a job: `queued`, `step`, `preview`, `image`, or how it ended."""

    name: str
    data: dict[str, Any]


class Service:
    """Accepts jobs, tells how they stand, and has them drawn."""

    def __init__(self, config: ServeConfig) -> None:
        """Open the store and read what the models say of themselves. Raises UserError."""
        self.config = config
        self.specs = read_models(config.models)
        self.reports = read_reports(self.specs, config.reports)
        self.shelf = Shelf(self.specs, read_loras(config.loras), config.device, config.memory)
        self.store = Store(config.out, config.database)
        self.metrics = Metrics()
        self.changes = Changes()
        self.uploads = Uploads(config.out / "uploads", config.max_upload_pixels)
        self.worker = Worker(config, self.store, self.shelf, self.uploads, self.changes, self.metrics)
        self.chosen: dict[str, str] = {}
        """The model that an owner chose for requests that name none, as A1111's clients do."""
        self.draining = False
        self._until = 0.0
        self.on_drain: list[Callable[[], None]] = []
        """What else is to end when the server is told to."""

    def start(self) -> None:
        """Begin to draw what is queued."""
        self.worker.start()

    def drain(self) -> None:
        """Accept no more jobs and begin no more; what is being drawn may go on for `config.drain` seconds."""
        if not self.draining:
            self._until = time.monotonic() + self.config.drain
        self.draining = True
        self.worker.drain()
        self.changes.tell_all()
        for end in self.on_drain:
            end()

    def stop(self) -> None:
        """Finish what is being drawn, or hand it back `config.drain` seconds after the first word of the end, and let
        go of everything."""
        self.drain()
        self.worker.stop(max(0.0, self._until - time.monotonic()))
        self.store.close()

    def submit(self, request: JobRequest, owner: str = "") -> JobView:
        """Store a job, and only then say so.

        Raises ConfigError or DataError where it can't be drawn, UnknownModel, QueueFull and Draining.
        """
        return self._views([self._submit(new_id(), request, owner)])[0]

    def _submit(self, id_: str, request: JobRequest, owner: str) -> JobRow:
        try:
            return self._accepted(id_, request, owner)
        except QueueFull:
            self.metrics.refused.inc()
            raise

    def _accepted(self, id_: str, request: JobRequest, owner: str) -> JobRow:
        if self.draining:
            raise Draining
        model = self.model_name(request.model)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        loras = tuple(f"{name}:{lora.weight:g}" for name, lora in self.shelf.chosen(request.loras))
        request = request.model_copy(update={"model": model, "seed": seed, "loras": loras})
        self._check(request, self.specs[model])
        limits = {"queue": self.config.queue, "rate": self.config.rate, "open_jobs": self.config.open_jobs}
        if request.pictures:  # which cost work and room, so nobody gets there who may have no more jobs
            self.store.check(owner, **limits)
        sent = {name: self.uploads.read(text, mask=name == "mask") for name, text in request.pictures.items()}
        draws = to_draw(self.specs[model], request, {name: source for name, (_, source) in sent.items()})
        self._check_size(draws[0].width, draws[0].height)
        for data, source in sent.values():
            self.uploads.keep(data, source.sha256)
        request = request.model_copy(update={name: source.sha256 for name, (_, source) in sent.items()})
        row = JobRow(
            id=id_,
            owner=owner,
            model=model,
            shape=hashlib.sha256(shape_of(model, loras, draws[0]).encode()).hexdigest(),
            settings=request.model_dump(),
            pictures=len(draws),
            steps=sum(map(steps_of, draws)),
            created=time.time(),
        )
        self.store.add(row, **limits)
        self.metrics.accepted.labels(model).inc()
        prompt = {"prompt": request.prompt} if self.config.log_prompts else {}
        log.info("job accepted", extra={"job": row.id, "owner": owner, "model": model, **prompt})
        self.worker.more()
        return row

    def model_name(self, name: str | None) -> str:
        """The model of that name, or the first. Raises UnknownModel."""
        name = name or next(iter(self.specs))
        if name not in self.specs:
            raise UnknownModel(f"There is no model {name[:100]!r} here; there are {', '.join(self.specs)}.")
        return name

    def report_url(self, model: str) -> str | None:
        """Where the report of a model is at this server, if it has one."""
        return f"/v1/reports/{quote(model)}" if model in self.reports else None

    def _check(self, request: JobRequest, spec: Spec) -> None:
        """Raise ConfigError where more is asked for than is allowed here, or can be added or ranked."""
        config = self.config
        for text, what in ((request.prompt, "prompt"), (request.negative, "negative prompt")):
            if len(text) > config.max_prompt:
                raise ConfigError(f"The {what} has {len(text)} characters; {config.max_prompt} are allowed here.")
        for name, asked, most in (
            ("n", request.n, config.max_count),
            ("best_of", request.best_of, config.max_count),
            ("steps", request.steps, config.max_steps),
        ):
            if asked is not None and asked > most:
                raise ConfigError(f"{name} is {asked}; up to {most} is allowed here.")
        if request.best_of is not None:
            ranking.check(spec, request.n, request.best_of)
        if request.loras and not spec.own_loop:
            raise ConfigError(f"{request.model} takes no LoRA; leave loras out, or name another model.")

    def _check_size(self, width: int | None, height: int | None) -> None:
        if width and height and width * height > self.config.max_pixels:
            raise ConfigError(f"{width}x{height} are more than the {self.config.max_pixels} pixels allowed here.")

    def get(self, id_: str, owner: str | None = None) -> JobView | None:
        """How a job stands, if it is the owner's; anybody's for None."""
        row = self.store.get(id_, owner)
        return None if row is None else self._views([row])[0]

    def listed(
        self,
        owner: str | None = None,
        *,
        state: State | None = None,
        before: int | None = None,
        drawn: bool = False,
        limit: int = 50,
    ) -> list[JobView]:
        """The newest jobs, newest first; `before` a job's number for older ones, `drawn` for those with pictures."""
        return self._views(self.store.listed(owner=owner, state=state, before=before, drawn=drawn, limit=limit))

    def cancel(self, id_: str, owner: str | None = None) -> JobView | None:
        """End a job, at once in the queue and within one step while it is drawn; one that has ended stays as it is."""
        if self.store.get(id_, owner) is None:
            return None
        if self.store.cancel(id_, self.worker.step_of(id_)):
            self.worker.cancel(id_)
            self.metrics.ended.labels("cancelled").inc()
            log.info("job ended", extra={"job": id_, "state": "cancelled"})
            self.changes.tell(id_)
        return self.get(id_, owner)

    def file(self, image: str, owner: str | None = None) -> Path | None:
        """Where a picture lies, if it is there and the owner's."""
        row = self.store.image(image, owner)
        path = self.config.out / row.file if row else None
        return path if path and path.is_file() else None

    async def follow(self, id_: str) -> AsyncIterator[Event]:
        """What happens to a job until it ends, beginning with how it stands now; ends early while draining."""
        told: dict[str, Any] = {}
        with self.changes.of(id_, steps=True) as waiter:
            while (job := await run_in_threadpool(self.get, id_)) is not None:
                preview = self.worker.preview_of(id_)
                for event in _news(job, preview, told):
                    yield event
                if job.state not in OPEN or self.draining:
                    return
                await waiter.wait(POLL)

    async def draw(self, request: JobRequest, owner: str = "") -> tuple[JobView, list[Path]]:
        """Store a job and wait until it ends. -> how it ended, and where those of its pictures lie that are there.

        Raises as `submit`, and Draining where it will not end while this server runs.
        """
        id_ = new_id()
        with self.changes.of(id_, steps=False) as waiter:
            await run_in_threadpool(self._submit, id_, request, owner)
            while True:
                await waiter.wait()
                if (ended := await run_in_threadpool(self._ended, id_)) is not None:
                    return ended

    def _ended(self, id_: str) -> tuple[JobView, list[Path]] | None:
        row, images = self.store.with_images(id_)
        if row.state in OPEN:
            if self.draining and row.state == "queued":
                raise Draining(id_)
            return None
        files = [self.config.out / image.file for image in images]
        return self._view(row, images, None), [file for file in files if file.is_file()]

    def _views(self, rows: Sequence[JobRow]) -> list[JobView]:
        images: dict[str, list[ImageRow]] = {}
        for image in self.store.images([row.id for row in rows if row.state != "queued"]):
            images.setdefault(image.job, []).append(image)
        places = self.store.places([row.number for row in rows if row.state == "queued"])
        return [self._view(row, images.get(row.id, ()), places.get(row.number)) for row in rows]

    def _view(self, row: JobRow, images: Sequence[ImageRow], place: int | None) -> JobView:
        live = self.worker.step_of(row.id) if row.state == "running" else None
        return JobView(
            id=row.id,
            number=row.number,
            state=row.state,  # type: ignore[arg-type]
            place=place,
            step=row.step if live is None else live,
            steps=row.steps,
            settings=row.settings,
            images=[
                ImageView(
                    id=image.id,
                    url=f"/v1/images/{image.id}",
                    number=image.number,
                    **own(row.settings, image.number),
                    width=image.width,
                    height=image.height,
                    score=image.score,
                )
                for image in (images if row.settings.get("best_of") is None or row.state == "done" else ())
            ],
            error=row.error,
            fault=row.fault,
            created=row.created,
            started=row.started,
            finished=row.finished,
        )


async def _of(request: Request) -> Service:  # async, or else FastAPI asks a thread for it
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


Served = Annotated[Service, Depends(_of)]
"""The service, as a route takes it."""


def _news(job: JobView, preview: bytes | None, told: dict[str, Any]) -> list[Event]:
    """What of a job was not told yet; `told` is brought up to date."""
    news = []
    for name, now in (
        ("queued", {"place": job.place} if job.state == "queued" else None),
        ("step", {"step": job.step, "steps": job.steps} if job.state == "running" else None),
    ):
        if now is not None and told.get(name) != now:
            news.append(Event(name, now))
            told[name] = now
    if preview is not None and told.get("preview") is not preview:
        news.append(Event("preview", {"jpeg": base64.b64encode(preview).decode()}))
        told["preview"] = preview
    images = told.setdefault("images", set())  # which need not come in their order
    news += [Event("image", image.model_dump()) for image in job.images if image.id not in images]
    images.update(image.id for image in job.images)
    if job.state not in OPEN:
        news.append(Event(job.state, json.loads(job.model_dump_json())))
    return news
