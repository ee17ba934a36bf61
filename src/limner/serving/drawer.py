"""One drawing of the server's: pictures that are drawn together, which tell how far they are and stop at a word."""

from __future__ import annotations

import io
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from limner.errors import UserError
from limner.generation.jobs import Job
from limner.serving.changes import Changes
from limner.serving.crew import Lane
from limner.serving.keeper import FAILED, Held, Keeper
from limner.serving.metrics import Metrics

if TYPE_CHECKING:
    from PIL.Image import Image

    from limner.generation.model import Model, Picture

log = logging.getLogger("limner.serve")

PREVIEW = 256  # pixels of its longer side, at most

Unit = Sequence[tuple[Held, int, Job]]
"""Pictures that are drawn together, each with its job here and its number there."""


def steps_of(job: Job) -> int:
    """Steps that a picture counts; one where only its pipeline knows how many it takes, and tells when it is done."""
    return job.steps_taken or 1


class Halt(Exception):
    """Ends a drawing at its next step."""


class Drawer:
    """Draws for a worker; several threads may at once."""

    def __init__(self, keeper: Keeper, changes: Changes, metrics: Metrics, halting: threading.Event) -> None:
        """`halting` ends what is being drawn."""
        self._keeper, self._changes, self._metrics, self._halting = keeper, changes, metrics, halting
        self._lock, self._scoring = threading.Lock(), threading.Lock()

    def draw(self, model: Model, unit: Unit, lane: Lane) -> None:
        """Draw pictures of one shape, leave the lane, and keep them. Raises as `Keeper.keep`."""
        try:
            drawn = self._drawn(model, unit, lane)
            lane.leave()
            self._keeper.keep(drawn)
        except Halt:
            pass
        except Exception:
            for held in jobs_of(unit):
                held.wanted = False
            raise

    def _drawn(self, model: Model, unit: Unit, lane: Lane) -> list[tuple[Held, int, Picture]]:
        """The pictures; where they fail together, each is tried and kept alone. Raises Halt."""
        shares = Counter(held.row.id for held, _, _ in unit)
        jobs = jobs_of(unit)
        todo, done = sum(steps_of(job) for _, _, job in unit), 0

        def advance(amount: int) -> None:
            nonlocal done
            with self._lock:  # as other pictures of the same job may be drawn beside
                for held in jobs:
                    share = shares[held.row.id]
                    held.step += (done + amount) * share // len(unit) - done * share // len(unit)
            done += amount

        def on_step(amount: int) -> None:
            self._metrics.steps.inc(amount)
            advance(amount if unit[0][2].steps_taken else 1)
            if todo - done <= amount:  # what chooses the next takes as long as a step of a small model
                lane.end_soon()
            for held in jobs:
                self._changes.tell(held.row.id, step=True)
            if self._halting.is_set() or not any(held.wanted for held in jobs):
                raise Halt

        def on_preview(job: Job, image: Callable[[], Image]) -> None:
            followed = [held for held, _, one in unit if one == job and self._changes.followed(held.row.id)]
            if followed:
                preview = _jpeg(image())
                for held in followed:
                    held.preview = preview

        try:
            pictures = model.draw(
                [job for _, _, job in unit], batch_size=len(unit), on_step=on_step, on_preview=on_preview
            )
            return [
                (held, number, self._scored(model, picture, held.best_of))
                for (held, number, _), picture in zip(unit, pictures, strict=True)
            ]
        except Halt:
            raise
        except Exception as error:
            if len(unit) > 1:
                advance(-done)
                for alone in unit:
                    if alone[0].wanted:
                        self.draw(model, [alone], Lane(threading.Condition()))  # its own: this one stays taken
                return []
            if not isinstance(error, UserError):
                log.exception("drawing failed", extra={"job": unit[0][0].row.id})
            self._keeper.fail(unit[0][0], sentence(error), fault=not isinstance(error, UserError))
            return []

    def _scored(self, model: Model, picture: Picture, best_of: int | None) -> Picture:
        if best_of is None:
            return picture
        with self._scoring:
            return model.scored(picture, best_of)


def jobs_of(unit: Unit) -> list[Held]:
    """Each once."""
    return [*{held.row.id: held for held, _, _ in unit}.values()]


def _jpeg(image: Image) -> bytes:
    """A small one."""
    out = io.BytesIO()
    small = image.copy()
    small.thumbnail((PREVIEW, PREVIEW))
    small.save(out, "JPEG", quality=80)
    return out.getvalue()


def sentence(error: Exception) -> str:
    """What a client is told."""
    if isinstance(error, UserError):
        return str(error)
    return FAILED
