"""The thread that draws: takes jobs under a lease, keeps each picture as soon as it is there, stops at a word."""

from __future__ import annotations

import io
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from limner.config import ServeConfig
from limner.errors import ModelError, UserError
from limner.generation.jobs import Job, Spec, make_jobs
from limner.serving.changes import Changes
from limner.serving.metrics import Metrics
from limner.serving.schemas import JobRequest
from limner.serving.shelf import Shelf
from limner.serving.store import Store, new_id, worker_id
from limner.serving.tables import ImageRow, JobRow
from limner.serving.uploads import Uploads

if TYPE_CHECKING:
    from PIL.Image import Image

    from limner.generation.model import Model, Picture

log = logging.getLogger("limner.serve")

TROUBLED = 5.0  # seconds until the next try where disk or database fail
POLL = 0.5  # seconds between looks into the queue, which another server may have filled
PULSE = 1.0  # seconds between signs of life, and so the longest until a cancel by another server is heard
PICTURES = "pictures"
PREVIEW = 256  # pixels of its longer side, at most


class Halt(Exception):
    """Ends a drawing at its next step."""


class CannotKeep(Exception):
    """A picture is drawn, and there is no place for it."""


@dataclass
class Held:
    """A job that is being drawn here."""

    row: JobRow
    step: int = 0
    preview: bytes | None = None
    """JPEG of what the picture that is drawn now is going to look like, roughly."""
    wanted: bool = True
    """Whether it still is; not when it was cancelled, or taken over."""


def to_draw(spec: Spec, request: JobRequest, uploads: Uploads) -> list[Job]:
    """The pictures of a request, whose own pictures are uploaded. Raises UserError where a setting doesn't fit."""
    return make_jobs(
        spec,
        [request.prompt],
        n=request.n,
        seed=request.seed or 0,
        steps=request.steps,
        guidance=request.guidance,
        negative=request.negative,
        size=request.size,
        scheduler=request.scheduler,
        guidance_rescale=request.guidance_rescale,
        variation=request.variation,
        image=None if request.image is None else uploads.picture(request.image),
        mask=None if request.mask is None else uploads.mask(request.mask),
        strength=request.strength,
    )


def shape_of(model: str, job: Job) -> str:
    """Equal for pictures that may be drawn together; what else keeps them apart, their painter knows."""
    return f"{model} {job.steps} {job.guidance} {job.width}x{job.height} {job.scheduler}"


class Worker:
    """Draws what is in the queue, one batch after the other."""

    def __init__(
        self,
        config: ServeConfig,
        store: Store,
        shelf: Shelf,
        uploads: Uploads,
        changes: Changes,
        metrics: Metrics,
    ) -> None:
        self.id = worker_id()
        self.ready = False
        """Whether the first model is loaded, so that drawing begins at once."""
        # On a CPU pictures are drawn one at a time (decision 4), so that there a job alone is ready soonest
        self._batch_size = 1 if shelf.device.type == "cpu" else config.batch_size
        self._config, self._store, self._shelf, self._uploads = config, store, shelf, uploads
        self._changes, self._metrics = changes, metrics
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()
        self._more = threading.Event()
        self._draining = threading.Event()
        self._halting = threading.Event()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True, name=name) for name, run in self._loops()]

    def _loops(self) -> list[tuple[str, Callable[[], None]]]:
        return [("draw", self._draw_all), ("pulse", self._pulse)]

    def start(self) -> None:
        """Begin to draw."""
        for thread in self._threads:
            thread.start()

    def more(self) -> None:
        """Look into the queue at once."""
        self._more.set()

    def drain(self) -> None:
        """Take no more jobs."""
        self._draining.set()
        self._more.set()

    def stop(self, seconds: float) -> None:
        """Take no more jobs, finish what is being drawn, and after so many seconds hand it back."""
        self.drain()
        if self._threads[0].is_alive() and not self._ended.wait(seconds):
            self._halting.set()
            self._ended.wait()

    def step_of(self, id_: str) -> int | None:
        """Steps done of a job that is being drawn here; None for others."""
        held = self._held.get(id_)
        return held.step if held else None

    def preview_of(self, id_: str) -> bytes | None:
        """JPEG of what a job that is being drawn here is going to look like, roughly."""
        held = self._held.get(id_)
        return held.preview if held else None

    def cancel(self, id_: str) -> None:
        """Stop drawing a job that was cancelled, within one step."""
        if held := self._held.get(id_):
            held.wanted = False

    def _draw_all(self) -> None:
        try:
            self._prepare()
            while not self._draining.is_set():
                try:
                    if jobs := self._store.take(self.id, pictures=self._batch_size, lease=self._config.lease):
                        self._draw(jobs)
                    else:
                        self._more.wait(POLL)
                        self._more.clear()
                except SQLAlchemyError:  # what was drawn then is taken again when its lease has run out
                    log.exception("the queue can't be used")
                    self._draining.wait(TROUBLED)
                except CannotKeep as error:  # as on a full disk, where no later job would fare better
                    log.error("a picture can't be written", extra={"why": str(error)})
                    self._store.give_back(self.id)
                    self._draining.wait(TROUBLED)
        finally:
            self._ended.set()

    def _prepare(self) -> None:
        with suppress(SQLAlchemyError):
            self._store.expire_dead(self.id)
        try:
            self._shelf.get(next(iter(self._shelf.specs)))
        except UserError as error:  # which its jobs will say too
            log.warning("model not loaded: %s", error)
        self.ready = True

    def _pulse(self) -> None:
        """Renew the leases, and hear what others did to the jobs."""
        while not self._ended.wait(PULSE):
            with self._lock:
                held = dict(self._held)
            try:
                still = self._store.renew(self.id, {id_: one.step for id_, one in held.items()}, self._config.lease)
            except SQLAlchemyError:
                log.exception("leases can't be renewed")
                continue
            for id_, one in held.items():
                one.wanted = one.wanted and id_ in still

    def _draw(self, jobs: Sequence[JobRow]) -> None:
        """Draw jobs of one shape, in batches that may cross from one to the next."""
        with self._lock:
            self._held = {job.id: Held(job) for job in jobs}
        started = time.monotonic()
        for job in jobs:
            log.info("job started", extra={"job": job.id, "model": job.model, "attempt": job.attempts})
            self._changes.tell(job.id)
        try:
            self._draw_held([held for held in self._held.values() if not self._given_up(held)])
        except Halt:
            given_back = self._store.give_back(self.id) if self._halting.is_set() else 0
            log.info("drawing stopped", extra={"given_back": given_back})
        finally:
            with self._lock:
                self._held = {}
            self._metrics.drawing.observe(time.monotonic() - started)
            for job in jobs:
                self._changes.tell(job.id)

    def _given_up(self, held: Held) -> bool:
        if held.row.attempts <= self._config.attempts:
            return False
        self._fail(held, f"{self._config.attempts} servers ended while they drew this; try other settings.", fault=True)
        return True

    def _draw_held(self, jobs: Sequence[Held]) -> None:
        if not jobs:
            return
        try:
            name = jobs[0].row.model
            if name not in self._shelf.specs:
                raise ModelError(f"There is no model {name} on this server any more.")
            model = self._shelf.get(name)
            todo = [(held, number, job) for held in jobs for number, job in self._missing(model.spec, held)]
        except SQLAlchemyError:
            raise
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("the model can't be used", extra={"model": name})
            for held in jobs:
                self._fail(held, _sentence(error), fault=True)
            return
        size = self._batch_size
        for start in range(0, len(todo), size):
            batch = [one for one in todo[start : start + size] if one[0].wanted]
            if batch:
                self._draw_batch(model, batch)

    def _missing(self, spec: Spec, held: Held) -> list[tuple[int, Job]]:
        """The pictures that a job still lacks: all, unless a server died while it drew it."""
        there = {image.number for image in self._store.images([held.row.id])}
        draws = to_draw(spec, JobRequest(**held.row.settings), self._uploads)
        if not there:  # of a server that died between a file and its row
            shutil.rmtree(self._folder(held.row.id), ignore_errors=True)
        held.step = sum(draws[number].steps_taken for number in there)
        return [(number, job) for number, job in enumerate(draws) if number not in there]

    def _draw_batch(self, model: Model, batch: Sequence[tuple[Held, int, Job]]) -> None:
        """Draw and keep pictures of one shape; where they fail together, each is tried alone."""
        before = {held.row.id: held.step for held, _, _ in batch}
        shares = Counter(held.row.id for held, _, _ in batch)
        advanced = 0

        def on_step(amount: int) -> None:
            nonlocal advanced
            advanced += amount
            self._metrics.steps.inc(amount)
            for id_, share in shares.items():
                self._held[id_].step = before[id_] + advanced * share // len(batch)
                self._changes.tell(id_, step=True)
            if self._halting.is_set() or not any(held.wanted for held, _, _ in batch):
                raise Halt

        def on_preview(job: Job, image: Image) -> None:
            held = next(held for held, _, one in batch if one == job)
            if self._changes.followed(held.row.id):
                held.preview = _jpeg(image)

        try:
            jobs = [job for _, _, job in batch]
            pictures = list(model.draw(jobs, batch_size=len(batch), on_step=on_step, on_preview=on_preview))
            for (held, number, _), picture in zip(batch, pictures, strict=True):
                self._keep(held, number, picture)
        except Halt:
            if self._halting.is_set():
                raise
        except (SQLAlchemyError, CannotKeep):
            raise
        except Exception as error:
            if len(batch) > 1:
                for held, number, job in batch:
                    held.step = before[held.row.id]
                    self._draw_batch(model, [(held, number, job)])
                return
            if not isinstance(error, UserError):
                log.exception("drawing failed", extra={"job": batch[0][0].row.id})
            self._fail(batch[0][0], _sentence(error), fault=not isinstance(error, UserError))

    def _keep(self, held: Held, number: int, picture: Picture) -> None:
        if not held.wanted:
            return
        job = held.row
        try:
            path = picture.save(self._folder(job.id))
        except OSError as error:
            raise CannotKeep(str(error)) from error
        file = path.relative_to(self._config.out).as_posix()
        image = ImageRow(
            id=new_id(), job=job.id, number=number, file=file, width=picture.image.width, height=picture.image.height
        )
        last = number == job.pictures - 1
        if self._store.keep(self.id, image, step=job.steps if last else held.step, last=last):
            self._metrics.pictures.labels(job.model).inc()
            if last:
                self._ended_as(held, "done")
        else:
            held.wanted = False
            path.unlink(missing_ok=True)
        self._changes.tell(job.id)

    def _fail(self, held: Held, error: str, *, fault: bool) -> None:
        held.wanted = False
        if self._store.fail(self.id, held.row.id, error, fault=fault):
            self._ended_as(held, "failed")

    def _ended_as(self, held: Held, state: str) -> None:
        self._metrics.ended.labels(state).inc()
        log.info("job ended", extra={"job": held.row.id, "state": state})

    def _folder(self, job: str) -> Path:
        return self._config.out / PICTURES / job[:2] / job


def _jpeg(image: Image) -> bytes:
    """A small one."""
    out = io.BytesIO()
    small = image.copy()
    small.thumbnail((PREVIEW, PREVIEW))
    small.save(out, "JPEG", quality=80)
    return out.getvalue()


def _sentence(error: Exception) -> str:
    """What a client is told."""
    if isinstance(error, UserError):
        return str(error)
    return "Limner failed while drawing this; the server's log says more."
