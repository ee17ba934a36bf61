"""What is drawn is put on disk and into the database."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from limner.serving.changes import Changes
from limner.serving.metrics import Metrics
from limner.serving.store import Store, new_id
from limner.serving.tables import ImageRow, JobRow

if TYPE_CHECKING:
    from limner.generation.model import Picture

log = logging.getLogger("limner.serve")

PICTURES = "pictures"
FAILED = "Limner failed while drawing this; the server's log says more."


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
    parts: int = 1
    """What is still to be begun or drawn of it."""
    since: float = field(default_factory=time.monotonic)
    """When it was taken, by the clock of `time.monotonic`."""

    @property
    def best_of(self) -> int | None:
        """Of how many pictures the best are kept, where not all are."""
        best_of: int | None = self.row.settings.get("best_of")
        return best_of


def folder_of(out: Path, job: str) -> Path:
    """Where the pictures of a job lie, below the server's folder."""
    return out / PICTURES / job[:2] / job


class Keeper:
    """Keeps pictures for a worker; any thread may ask it to."""

    def __init__(self, worker: str, out: Path, store: Store, changes: Changes, metrics: Metrics) -> None:
        self._worker, self._out, self._store, self._changes, self._metrics = worker, out, store, changes, metrics

    def keep(self, pictures: Sequence[tuple[Held, int, Picture]]) -> None:
        """Keep pictures, each with its job and its number there. Raises CannotKeep or SQLAlchemyError."""
        for held, number, picture in pictures:
            try:
                self._keep(held, number, picture)
            except (SQLAlchemyError, CannotKeep):
                raise
            except Exception:
                log.exception("keeping failed", extra={"job": held.row.id})
                self.fail(held, FAILED, fault=True)

    def fail(self, held: Held, error: str, *, fault: bool) -> None:
        """End a job, saying why and whose fault it is."""
        held.wanted = False
        if self._store.fail(self._worker, held.row.id, error, fault=fault):
            self._ended_as(held, "failed")

    def _keep(self, held: Held, number: int, picture: Picture) -> None:
        if not held.wanted:
            return
        job, record = held.row, picture.record
        try:
            path = picture.save(folder_of(self._out, job.id))
            size = path.stat().st_size
        except OSError as error:
            raise CannotKeep(error.strerror or type(error).__name__) from error  # the file's name is the prompt
        image = ImageRow(
            id=new_id(),
            job=job.id,
            number=number,
            file=path.relative_to(self._out).as_posix(),
            width=picture.image.width,
            height=picture.image.height,
            bytes=size,
            score=record.get("score"),
        )
        best = job.settings["n"] if held.best_of else None
        kept = self._store.keep(self._worker, image, step=held.step, best=best)
        if kept is None:
            held.wanted = False
            path.unlink(missing_ok=True)
            return
        self._metrics.pictures.labels(job.model).inc()
        if kept.last:
            self._ended_as(held, "done")
        else:
            self._changes.tell(job.id, step=True)
        for file in kept.dropped:
            (self._out / file).unlink(missing_ok=True)

    def _ended_as(self, held: Held, state: str) -> None:
        self._metrics.ended.labels(state).inc()
        log.info("job ended", extra={"job": held.row.id, "state": state})
        self._changes.tell(held.row.id)

    def clear(self, job: str, known: Collection[str]) -> None:
        """Remove what lies with a job and is none of `known`, which are files below the server's folder.

        A server leaves such files that dies before it has written their rows.
        """
        for file in folder_of(self._out, job).glob("*"):
            if file.relative_to(self._out).as_posix() not in known:
                file.unlink(missing_ok=True)
