"""The thread that draws: takes jobs under a lease, hands each picture on to be kept, stops at a word."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from limner.config import ServeConfig
from limner.errors import ModelError, UserError
from limner.generation.jobs import Job, Spec, make_jobs
from limner.serving.changes import Changes
from limner.serving.keeper import FAILED, CannotKeep, Held, Keeper
from limner.serving.metrics import Metrics
from limner.serving.retention import make_room
from limner.serving.schemas import JobRequest
from limner.serving.shelf import Shelf
from limner.serving.store import Store, worker_id
from limner.serving.tables import ImageRow, JobRow
from limner.serving.uploads import Uploads

if TYPE_CHECKING:
    from PIL.Image import Image

    from limner.generation.model import Model
    from limner.generation.sources import Source

log = logging.getLogger("limner.serve")

TROUBLED = 5.0  # seconds until the next try where disk or database fail
POLL = 0.5  # seconds between looks into the queue, which another server may have filled
PULSE = 1.0  # seconds between signs of life, and so the longest until a cancel by another server is heard
TIDY = 60.0  # seconds between looks at the room on the disk
PREVIEW = 256  # pixels of its longer side, at most
SHAPES = 1000  # of which it is known how many pictures are drawn at once


class Halt(Exception):
    """Ends a drawing at its next step."""


def to_draw(spec: Spec, request: JobRequest, sources: Mapping[str, Source]) -> list[Job]:
    """The pictures of a request that begins with `sources`. Raises UserError where a setting doesn't fit."""
    return make_jobs(
        spec,
        [request.prompt],
        n=request.best_of or request.n,
        seed=request.seed or 0,
        steps=request.steps,
        guidance=request.guidance,
        negative=request.negative,
        size=request.size,
        scheduler=request.scheduler,
        guidance_rescale=request.guidance_rescale,
        variation=request.variation,
        image=sources.get("image"),
        mask=sources.get("mask"),
        strength=request.strength,
    )


def shape_of(model: str, loras: Sequence[str], job: Job) -> str:
    """Equal for pictures that may be drawn together; what else keeps them apart, their painter knows."""
    return f"{model} {' '.join(loras)} {job.steps} {job.guidance} {job.width}x{job.height} {job.scheduler}"


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
        self._at_once: dict[str, int] = {}
        """How many pictures of a shape are drawn at once, of those drawn lately."""
        self._config, self._store, self._shelf, self._uploads = config, store, shelf, uploads
        self._changes, self._metrics = changes, metrics
        self._keeper = Keeper(self.id, config.out, store, changes, metrics)
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()
        self._more = threading.Event()
        self._draining = threading.Event()
        self._halting = threading.Event()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True, name=name) for name, run in self._loops()]

    def _loops(self) -> list[tuple[str, Callable[[], None]]]:
        return [("draw", self._draw_all), ("pulse", self._pulse), ("tidy", self._tidy)]

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

    def halt(self) -> None:
        """Hand what is being drawn back at its next step."""
        self._halting.set()

    def stop(self, seconds: float) -> None:
        """Take no more jobs, finish what is being drawn, and after so many seconds hand it back."""
        self.drain()
        if self._threads[0].is_alive() and not self._ended.wait(seconds):
            self.halt()
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
                self._go_on()
            self._go_on(last=True)
        finally:
            self.ready = False
            self._keeper.close()
            self._ended.set()

    def _go_on(self, *, last: bool = False) -> None:
        """Draw the jobs that are next, or wait for some; with `last` only see what was drawn kept."""
        try:
            jobs = [] if last else self._store.take(self.id, pictures=self._room, lease=self._config.lease)
            if jobs:
                self._draw(jobs)
                return
            self._keeper.settle()
            if not last:
                self._more.wait(POLL)
                self._more.clear()
        except SQLAlchemyError:  # what was drawn then is taken again when its lease has run out
            log.exception("the queue can't be used")
            self._draining.wait(TROUBLED)
        except CannotKeep as error:  # as on a full disk, where no later job would fare better
            log.error("a picture can't be written", extra={"why": str(error)})
            with suppress(SQLAlchemyError):
                self._store.give_back(self.id)
            self._draining.wait(TROUBLED)
        except Exception:  # whatever it was, the other jobs are drawn
            log.exception("drawing goes on after a fault")
            self._draining.wait(TROUBLED)

    def _room(self, first: JobRow) -> int:
        """How many pictures to take with the job that is next; on a CPU it alone is ready soonest, if it is large."""
        return self._at_once.get(first.shape, 1 if self._shelf.device.type == "cpu" else self._config.batch_size)

    def _prepare(self) -> None:
        with suppress(SQLAlchemyError):
            self._store.expire_dead(self.id)
        try:
            self._shelf.get(next(iter(self._shelf.specs)))
        except UserError as error:  # which its jobs will say too
            log.warning("model not loaded: %s", error)
        except Exception:  # as where the GPU's memory is full: another model may fit
            log.exception("model not loaded")
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

    def _tidy(self) -> None:
        """Keep to the room on the disk."""
        while True:
            try:
                removed = make_room(self._config.out, self._store, self._uploads, self._config.disk * 2**30)
            except (SQLAlchemyError, OSError):
                log.exception("old jobs can't be removed")
            else:
                if removed:
                    log.info("old jobs removed", extra={"jobs": removed})
            if self._ended.wait(TIDY):
                return

    def _draw(self, jobs: Sequence[JobRow]) -> None:
        """Draw jobs of one shape, in batches that may cross from one to the next."""
        held = {job.id: Held(job) for job in jobs}
        with self._lock:
            self._held |= held
        started = time.monotonic()
        for job in jobs:
            log.info("job started", extra={"job": job.id, "model": job.model, "attempt": job.attempts})
            self._changes.tell(job.id, step=True)
        try:
            self._draw_held([one for one in held.values() if not self._given_up(one)])
            self._keeper.then(lambda: self._let_go(held, started))
        except Exception as error:
            self._let_go(held, started)
            if not isinstance(error, Halt):
                raise
            self._keeper.settle()
            given_back = self._store.give_back(self.id)
            log.info("drawing stopped", extra={"given_back": given_back})

    def _let_go(self, held: Mapping[str, Held], started: float) -> None:
        with self._lock:
            self._held = {id_: one for id_, one in self._held.items() if one is not held.get(id_)}
        self._metrics.drawing.observe(time.monotonic() - started)

    def _given_up(self, held: Held) -> bool:
        if held.row.attempts <= self._config.attempts:
            return False
        self._keeper.fail(
            held, f"{self._config.attempts} servers ended while they drew this; try other settings.", fault=True
        )
        return True

    def _draw_held(self, jobs: Sequence[Held]) -> None:
        if not jobs:
            return
        name, texts = jobs[0].row.model, jobs[0].row.settings.get("loras", ())
        try:
            if name not in self._shelf.specs:
                raise ModelError(f"There is no model {name} on this server any more.")
            model = self._shelf.get(name, tuple(lora for _, lora in self._shelf.chosen(texts)))
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("the model can't be used", extra={"model": name})
            for held in jobs:  # of a LoRA that is not for the model, who chose it is to blame
                self._keeper.fail(held, _sentence(error), fault=not (texts and isinstance(error, UserError)))
            return
        images = self._store.images([held.row.id for held in jobs])
        todo = [(held, number, job) for held in jobs for number, job in self._missing(model.spec, held, images)]
        if not todo:
            return
        if len(self._at_once) == SHAPES:
            self._at_once.clear()
        size = self._at_once[jobs[0].row.shape] = model.at_once(todo[0][2], self._config.batch_size)
        for start in range(0, len(todo), size):
            batch = [one for one in todo[start : start + size] if one[0].wanted]
            if batch:
                self._draw_batch(model, batch)

    def _missing(self, spec: Spec, held: Held, images: Sequence[ImageRow]) -> list[tuple[int, Job]]:
        """The pictures that a job still lacks, of which `images` are there: all, unless a server died while it drew it.

        Empty where it can't be drawn any more; then it alone has failed, and not those that share a batch with it.
        """
        own = [image for image in images if image.job == held.row.id]
        there = {image.number for image in own}
        try:
            request = JobRequest(**held.row.settings)
            draws = to_draw(spec, request, self._uploads.sources(request))
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("the job can't be used", extra={"job": held.row.id})
            self._keeper.fail(held, _sentence(error), fault=True)
            return []
        self._keeper.clear(held.row.id, [image.file for image in own])
        held.step = sum(draws[number].steps_taken for number in there)
        return [(number, job) for number, job in enumerate(draws) if number not in there]

    def _draw_batch(self, model: Model, batch: Sequence[tuple[Held, int, Job]]) -> None:
        """Draw pictures of one shape, which are kept meanwhile; where they fail together, each is tried alone."""
        of_id = {held.row.id: held for held, _, _ in batch}
        before = {id_: held.step for id_, held in of_id.items()}
        shares = Counter(held.row.id for held, _, _ in batch)
        advanced = 0

        def on_step(amount: int) -> None:
            nonlocal advanced
            advanced += amount
            self._metrics.steps.inc(amount)
            for id_, share in shares.items():
                of_id[id_].step = before[id_] + advanced * share // len(batch)
                self._changes.tell(id_, step=True)
            if self._halting.is_set() or not any(held.wanted for held, _, _ in batch):
                raise Halt

        def on_preview(job: Job, image: Callable[[], Image]) -> None:
            followed = [held for held, _, one in batch if one == job and self._changes.followed(held.row.id)]
            if followed:
                preview = _jpeg(image())
                for held in followed:
                    held.preview = preview

        try:
            jobs = [job for _, _, job in batch]
            pictures = list(model.draw(jobs, batch_size=len(batch), on_step=on_step, on_preview=on_preview))
            drawn = [
                (held, number, model.scored(picture, held.best_of) if held.best_of else picture)
                for (held, number, _), picture in zip(batch, pictures, strict=True)
            ]
        except Halt:
            if self._halting.is_set():
                raise
        except Exception as error:
            if len(batch) > 1:
                for id_, held in of_id.items():
                    held.step = before[id_]
                for one in batch:
                    self._draw_batch(model, [one])
                return
            if not isinstance(error, UserError):
                log.exception("drawing failed", extra={"job": batch[0][0].row.id})
            self._keeper.settle()  # what the job has so far stays
            self._keeper.fail(batch[0][0], _sentence(error), fault=not isinstance(error, UserError))
        else:
            self._keeper.begin(drawn)


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
    return FAILED
