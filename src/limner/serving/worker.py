"""What draws: takes jobs under a lease whenever a lane is free, keeps each picture, stops at a word."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from limner.config import ServeConfig
from limner.errors import UserError
from limner.generation.jobs import Job, Spec, make_jobs
from limner.serving.changes import Changes
from limner.serving.crew import Crew, Lane
from limner.serving.drawer import Drawer, Unit, jobs_of, sentence, steps_of
from limner.serving.keeper import CannotKeep, Held, Keeper
from limner.serving.metrics import Metrics
from limner.serving.retention import make_room
from limner.serving.schemas import JobRequest
from limner.serving.shelf import Shelf
from limner.serving.store import Store, worker_id
from limner.serving.tables import ImageRow, JobRow
from limner.serving.uploads import Uploads

if TYPE_CHECKING:
    from limner.generation.model import Model
    from limner.generation.sources import Source

log = logging.getLogger("limner.serve")

TROUBLED = 5.0  # seconds until the next try where disk or database fail
POLL = 0.5  # seconds between looks into the queue, which another server may have filled
PULSE = 1.0  # seconds between signs of life, and so the longest until a cancel by another server is heard
TIDY = 60.0  # seconds between looks at the room on the disk


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
    """Draws what is in the queue, in its order: on a CPU pictures side by side, elsewhere in batches."""

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
        self._config, self._store, self._shelf, self._uploads = config, store, shelf, uploads
        self._changes, self._metrics = changes, metrics
        self._side_by_side = shelf.device.type == "cpu"
        self._crew = Crew()
        self._drawn_with: object = None
        self._keeper = Keeper(self.id, config.out, store, changes, metrics)
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()
        self._more = threading.Event()
        self._draining = threading.Event()
        self._halting = threading.Event()
        self._ended = threading.Event()  # nothing is drawn any more
        self._stopped = threading.Event()  # nor heard of other servers
        self._drawer = Drawer(self._keeper, changes, metrics, self._halting)
        loops = ("take", self._draw_all), ("pulse", self._pulse), ("tidy", self._tidy)
        self._threads = [threading.Thread(target=run, daemon=True, name=name) for name, run in loops]

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
        """Take no more jobs, finish what is being drawn, or hand it back after so many seconds, and end."""
        self.drain()
        if self._threads[0].is_alive() and not self._ended.wait(seconds):
            self.halt()
            self._ended.wait()
        self._stopped.set()

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
            self._crew.close()
            self._ended.set()
            self._changes.tell_all()  # as what was handed back will not end here

    def _go_on(self, *, last: bool = False) -> None:
        """Begin the jobs that are next, or wait for some; with `last` only see what was begun kept, or handed back."""
        try:
            if last:
                self._finish()
            else:
                self._take()
        except SQLAlchemyError:  # what was drawn then is taken again when its lease has run out
            log.exception("the queue can't be used")
            self._draining.wait(TROUBLED)
        except CannotKeep as error:  # as on a full disk, where no later job would fare better
            log.error("a picture can't be written", extra={"why": str(error)})
            self._drop_all()
            with suppress(SQLAlchemyError):
                self._store.give_back(self.id)
            self._draining.wait(TROUBLED)
        except Exception:  # whatever it was, the other jobs are drawn
            log.exception("drawing goes on after a fault")
            self._draining.wait(TROUBLED)

    def _take(self) -> None:
        self._crew.wait()
        if self._draining.is_set():
            return
        room = 1 if self._side_by_side else self._config.batch_size
        if jobs := self._store.take(self.id, self._shelf.specs, pictures=room, lease=self._config.lease):
            self._begin(jobs)
        else:
            self._more.wait(POLL)
            self._more.clear()

    def _finish(self) -> None:
        self._crew.finish()
        if self._halting.is_set():
            log.info("drawing stopped", extra={"given_back": self._store.give_back(self.id)})

    def _drop_all(self) -> None:
        """Wait until nothing is drawn any more, and keep none of it."""
        with self._lock:
            for held in self._held.values():
                held.wanted = False
        with suppress(Exception):
            self._crew.finish()

    def _prepare(self) -> None:
        with suppress(SQLAlchemyError):
            self._store.put_back_lost(self.id)
        try:
            self._shelf.get(next(iter(self._shelf.specs)))
        except UserError as error:  # which its jobs will say too
            log.warning("model not loaded: %s", error)
        except Exception:  # as where the GPU's memory is full: another model may fit
            log.exception("model not loaded")
        self.ready = True

    def _pulse(self) -> None:
        """Renew the leases, hear what others did to the jobs, and put back those of others that are no more."""
        while not self._stopped.wait(PULSE):
            with self._lock:
                held = dict(self._held)
            try:
                still = self._store.renew(self.id, {id_: one.step for id_, one in held.items()}, self._config.lease)
                if self._store.put_back_lost(self.id):
                    self.more()
                for id_ in self._store.ended(self._changes.awaited().difference(held)):
                    self._changes.tell(id_)
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
            if self._stopped.wait(TIDY):
                return

    def _begin(self, jobs: Sequence[JobRow]) -> None:
        """Begin jobs of one shape, in units that may cross from one to the next."""
        all_held = [Held(job) for job in jobs]
        with self._lock:
            self._held |= {held.row.id: held for held in all_held}
        for job in jobs:
            log.info("job started", extra={"job": job.id, "model": job.model, "attempt": job.attempts})
            self._changes.tell(job.id, step=True)
        try:
            self._begin_held([held for held in all_held if not self._given_up(held)])
        finally:
            self._let_go(all_held)

    def _let_go(self, some: Iterable[Held]) -> None:
        """What has begun or drawn a part of these jobs is done with it; they are held no more when all are."""
        with self._lock:
            for held in some:
                held.parts -= 1
                if not held.parts:
                    self._metrics.drawing.observe(time.monotonic() - held.since)
                    if self._held.get(held.row.id) is held:
                        del self._held[held.row.id]

    def _given_up(self, held: Held) -> bool:
        if held.row.attempts <= self._config.attempts:
            return False
        self._keeper.fail(
            held, f"{self._config.attempts} servers ended while they drew this; try other settings.", fault=True
        )
        return True

    def _begin_held(self, jobs: Sequence[Held]) -> None:
        if not jobs:
            return
        name, texts = jobs[0].row.model, jobs[0].row.settings.get("loras", ())
        if self._drawn_with != (name, texts):  # which may have to make room for this
            self._crew.finish()
            self._drawn_with = name, texts
        try:
            model = self._shelf.get(name, tuple(lora for _, lora in self._shelf.chosen(texts)))
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("the model can't be used", extra={"model": name})
            for held in jobs:  # of a LoRA that is not for the model, who chose it is to blame
                self._keeper.fail(held, sentence(error), fault=not (texts and isinstance(error, UserError)))
            return
        images = self._store.images([held.row.id for held in jobs if held.row.pictures > 1])  # by a server that died
        todo = [(held, number, job) for held in jobs for number, job in self._missing(model.spec, held, images)]
        if not todo:
            return
        at_once = model.at_once(todo[0][2], self._config.batch_size)
        lanes, size = (at_once, 1) if self._side_by_side else (1, at_once)
        self._crew.share_out(lanes)
        for start in range(0, len(todo), size):
            self._crew.wait()
            unit = [one for one in todo[start : start + size] if one[0].wanted]
            if unit and not self._halting.is_set():
                with self._lock:
                    for held in jobs_of(unit):
                        held.parts += 1
                self._crew.begin(functools.partial(self._draw, model, unit))

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
            self._keeper.fail(held, sentence(error), fault=True)
            return []
        self._keeper.clear(held.row.id, [image.file for image in own])
        held.step = sum(steps_of(draws[number]) for number in there)
        return [(number, job) for number, job in enumerate(draws) if number not in there]

    def _draw(self, model: Model, unit: Unit, lane: Lane) -> None:
        try:
            self._drawer.draw(model, unit, lane)
        finally:
            self._let_go(jobs_of(unit))
