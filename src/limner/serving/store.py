"""The queue on disk: jobs, their pictures and the tokens, in SQLite or PostgreSQL.

A job is `queued`, then `running`, then `done`, `failed` or `cancelled`. It runs under a lease, which its server renews;
when that server died, the lease runs out and another puts the job back. Every change says in its WHERE what it
comes from, so that a job ends once, however many servers share the queue and whenever one is killed.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import bindparam, case, delete, func, insert, select, text, update
from sqlalchemy.engine import Connection, Row
from sqlalchemy.exc import IntegrityError

from limner.errors import RunError
from limner.serving.database import opened
from limner.serving.tables import IMAGES, JOBS, OPEN, TOKENS, ImageRow, JobRow, State

ID = re.compile("[0-9a-f]{32}")
BEST_FIRST = (IMAGES.c.score.desc(), IMAGES.c.number)


def _held(worker: Any) -> tuple[Any, ...]:
    return JOBS.c.worker == worker, JOBS.c.state == "running"


# What every picture needs is written once: that takes SQLAlchemy as long as asking does
UNFINISHED = select(func.count()).select_from(JOBS).where(JOBS.c.state.in_(OPEN))
QUEUED = JOBS.alias()  # another name, or else a subquery would mean the very row that is updated
NEXT = (
    select(QUEUED.c.number, QUEUED.c.pictures)
    .where(QUEUED.c.state == "queued", QUEUED.c.model.in_(bindparam("models", expanding=True)))
    .order_by(QUEUED.c.number)
    .with_for_update(skip_locked=True)
    .limit(1)
)
TAKEN = (
    update(JOBS)
    .values(
        state="running",
        worker=bindparam("by"),
        lease=bindparam("until"),
        attempts=JOBS.c.attempts + 1,
        started=func.coalesce(JOBS.c.started, bindparam("now")),
    )
    .returning(JOBS)
)
TAKE_NEXT = TAKEN.where(JOBS.c.number == NEXT.with_only_columns(QUEUED.c.number).scalar_subquery())
HOLD = (
    update(JOBS)
    .where(JOBS.c.id == bindparam("job"), *_held(bindparam("by")))
    .values(step=case((JOBS.c.step < bindparam("at"), bindparam("at")), else_=JOBS.c.step))
    .returning(JOBS.c.pictures)
)
FINISH = (
    update(JOBS)
    .where(JOBS.c.id == bindparam("job"))
    .values(state="done", step=JOBS.c.steps, finished=bindparam("now"), worker=None, lease=None)
)
JOB = select(JOBS).where(JOBS.c.id == bindparam("job"))
NUMBERS = select(IMAGES.c.number).where(IMAGES.c.job == bindparam("job"))
OF_JOB = select(IMAGES).where(IMAGES.c.job == bindparam("job")).order_by(*BEST_FIRST)


class QueueFull(Exception):
    """No more jobs now; `seconds` until it is worth while to ask again."""

    def __init__(self, message: str, seconds: float, *, own: bool) -> None:
        super().__init__(message)
        self.seconds = seconds
        self.own = own
        """Whether it is the token's own limit."""


@dataclass(frozen=True)
class Kept:
    """What came of a picture that was kept."""

    last: bool
    """Whether the job has ended with it."""
    dropped: Sequence[str] = ()
    """Files of pictures that are not among the best, which nobody knows any more."""


def new_id() -> str:
    """A name that nobody can guess."""
    return uuid.uuid4().hex


def worker_id() -> str:
    """A name for this process that says where it runs."""
    return f"{_place()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"


def _place() -> str:
    """Where a process is known by its number: this machine since it was started, and a container for itself."""
    with suppress(OSError):  # where there is no Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _is_dead(worker: str, me: str) -> bool:
    """Whether a worker of this place is no more; what runs elsewhere is only known by its lease."""
    place, pid, _ = worker.rsplit("/", 2)
    if place != _place() or worker == me:
        return False
    if int(pid) == os.getpid():  # the process had our number before us
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


class Store:
    """The queue; all methods may be called from any thread."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        """Open the database, or make it. Raises ConfigError where there is no right to, or for a bad URL."""
        self.engine = opened(folder, url)
        self._reading = self.engine.execution_options(write=False)
        self._passing = self.engine.execution_options(durable=False)
        # SQLite has one writer at a time, and those that wait would look again only now and then
        self._turn: AbstractContextManager[Any] = (
            threading.Lock() if self.engine.dialect.name == "sqlite" else nullcontext()
        )

    def reading(self) -> AbstractContextManager[Connection]:
        """A transaction that changes nothing."""
        return self._reading.begin()

    @contextmanager
    def writing(self, *, durable: bool = True) -> Iterator[Connection]:
        """A transaction. One that is not durable outlives the server, but may be lost when the machine dies."""
        with self._turn, (self.engine if durable else self._passing).begin() as connection:
            yield connection

    def close(self) -> None:
        """Let go of the connections."""
        self.engine.dispose()

    def ping(self) -> None:
        """Raise OperationalError where the database does not answer."""
        with self.reading() as connection:
            connection.execute(text("SELECT 1"))

    # What clients do

    def add(self, job: JobRow, *, queue: int, rate: int, open_jobs: int) -> JobRow:
        """Store a new job. -> the same with its number. Raises QueueFull where all, or its owner, have as many as they
        may.

        `queue` and `open_jobs` count unfinished jobs of all and of the owner, `rate` is the owner's new ones a minute.
        """
        values = {name: value for name, value in vars(job).items() if name != "number"}
        with self.writing() as connection:
            if job.owner:
                connection.execute(select(TOKENS).where(TOKENS.c.name == job.owner).with_for_update())
            _check(connection, job.owner, job.created, queue=queue, rate=rate, open_jobs=open_jobs)
            number = connection.execute(insert(JOBS), values).inserted_primary_key[0]  # type: ignore[index]
        return replace(job, number=number)

    def check(self, owner: str, *, queue: int, rate: int, open_jobs: int) -> None:
        """Raise QueueFull where `add` would now."""
        with self.reading() as connection:
            _check(connection, owner, time.time(), queue=queue, rate=rate, open_jobs=open_jobs)

    def get(self, id_: str, owner: str | None = None) -> JobRow | None:
        """A job, if it is the owner's; of anybody for None."""
        if not ID.fullmatch(id_):
            return None
        with self.reading() as connection:
            row = connection.execute(JOB.where(*_owned(owner)), {"job": id_}).one_or_none()
        return _job(row) if row else None

    def places(self, numbers: Collection[int]) -> dict[int, int]:
        """How many queued jobs stand before each of those of these numbers that are queued."""
        if not numbers:
            return {}
        before = (func.row_number().over(order_by=JOBS.c.number) - 1).label("before")
        queue = select(JOBS.c.number, before).where(JOBS.c.state == "queued").subquery()
        with self.reading() as connection:
            rows = connection.execute(select(queue.c.number, queue.c.before).where(queue.c.number.in_(numbers)))
            return dict(rows.tuples().all())

    def listed(
        self,
        *,
        owner: str | None = None,
        state: State | None = None,
        before: int | None = None,
        drawn: bool = False,
        limit: int,
    ) -> Sequence[JobRow]:
        """The newest jobs, or those older than the one of number `before`, newest first; with `drawn` only those that
        have pictures."""
        wanted = select(JOBS).where(*_owned(owner))
        if drawn:
            wanted = wanted.where(select(IMAGES.c.id).where(IMAGES.c.job == JOBS.c.id).exists())
        if state is not None:
            wanted = wanted.where(JOBS.c.state == state)
        if before is not None:
            wanted = wanted.where(JOBS.c.number < before)
        with self.reading() as connection:
            rows = connection.execute(wanted.order_by(JOBS.c.number.desc()).limit(limit)).all()
        return list(map(_job, rows))

    def images(self, jobs: Collection[str]) -> Sequence[ImageRow]:
        """The pictures of some jobs, the best first or else in the order of their numbers."""
        if not jobs:
            return []
        wanted = select(IMAGES).where(IMAGES.c.job.in_(jobs)).order_by(IMAGES.c.job, *BEST_FIRST)
        with self.reading() as connection:
            return list(map(_image, connection.execute(wanted)))

    def with_images(self, id_: str) -> tuple[JobRow, Sequence[ImageRow]]:
        """A job that is there, and its pictures, the best first or else in the order of their numbers."""
        with self.reading() as connection:
            row, images = (connection.execute(wanted, {"job": id_}) for wanted in (JOB, OF_JOB))
            return _job(row.one()), list(map(_image, images))

    def image(self, id_: str, owner: str | None = None) -> ImageRow | None:
        """A picture, if its job is the owner's."""
        if not ID.fullmatch(id_):
            return None
        wanted = select(IMAGES).join(JOBS, JOBS.c.id == IMAGES.c.job).where(IMAGES.c.id == id_, *_owned(owner))
        with self.reading() as connection:
            row = connection.execute(wanted).one_or_none()
        return _image(row) if row else None

    def cancel(self, id_: str, step: int | None) -> bool:
        """End a job that has not ended, at a step where that is known; tell whether that was so."""
        known = {} if step is None else {"step": step}
        return self._end(JOBS.c.id == id_, JOBS.c.state.in_(OPEN), state="cancelled", **known)

    def ended(self, jobs: Collection[str]) -> Sequence[str]:
        """Those of these jobs that have ended, or were never there."""
        if not jobs:
            return []
        with self.reading() as connection:
            still = connection.scalars(select(JOBS.c.id).where(JOBS.c.id.in_(jobs), JOBS.c.state.in_(OPEN)))
            return [*set(jobs).difference(still)]

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        with self.reading() as connection:
            rows = connection.execute(select(JOBS.c.state, func.count()).group_by(JOBS.c.state))
            return dict(rows.tuples().all())

    # What workers do

    def take(self, worker: str, models: Collection[str], *, pictures: int, lease: float) -> Sequence[JobRow]:
        """The job that is next of these models, and further ones of its shape with up to so many pictures in all, for
        `lease` seconds."""
        now, those = time.time(), {"models": list(models)}
        values = {"by": worker, "until": now + lease, "now": now}
        with self.writing(durable=False) as connection:
            rows = [*connection.execute(TAKE_NEXT, values | those)]
            if rows and (room := pictures - rows[0].pictures) > 0:
                further = []
                for number, count in connection.execute(NEXT.where(QUEUED.c.shape == rows[0].shape).limit(room), those):
                    if count <= room:
                        further.append(number)
                        room -= count
                rows += connection.execute(TAKEN.where(JOBS.c.number.in_(further)), values)
        return sorted(map(_job, rows), key=lambda job: job.number)

    def renew(self, worker: str, steps: dict[str, int], lease: float) -> set[str]:
        """Renew the leases of jobs and note their steps; tell which of them the worker still holds."""
        if not steps:
            return set()
        further = [((JOBS.c.id == id_) & (JOBS.c.step < step), step) for id_, step in steps.items()]
        values = {"lease": time.time() + lease, "step": case(*further, else_=JOBS.c.step)}
        renewed = update(JOBS).where(*_held(worker), JOBS.c.id.in_(steps)).values(**values).returning(JOBS.c.id)
        with self.writing(durable=False) as connection:
            return set(connection.scalars(renewed))

    def keep(self, worker: str, image: ImageRow, *, step: int, best: int | None = None) -> Kept | None:
        """Add a picture to a job that the worker holds, which ends when all are there, and then has its `best` ones
        only; None where the worker doesn't hold the job, or the picture is there already."""
        job = {"job": image.job}
        with self.writing() as connection:
            # A later step may have been told meanwhile, which stays
            pictures = connection.scalar(HOLD, {**job, "by": worker, "at": step})
            if pictures is None:
                return None
            there = set(connection.scalars(NUMBERS, job)) if pictures > 1 else ()  # a job ends with its only one
            if image.number in there:
                return None
            connection.execute(insert(IMAGES), vars(image))
            if len(there) + 1 < pictures:
                return Kept(last=False)
            connection.execute(FINISH, {**job, "now": time.time()})
            if best is None:
                return Kept(last=True)
            others = connection.execute(OF_JOB.offset(best), job).all()
            connection.execute(delete(IMAGES).where(IMAGES.c.id.in_([other.id for other in others])))
            return Kept(last=True, dropped=[other.file for other in others])

    def fail(self, worker: str, id_: str, error: str, *, fault: bool) -> bool:
        """End a job that the worker holds, saying why and whose fault it is; tell whether it held it."""
        return self._end(JOBS.c.id == id_, *_held(worker), state="failed", error=error, fault=fault)

    def give_back(self, worker: str) -> int:
        """Put all jobs that the worker holds back into the queue, without blame; tell how many."""
        values = {"state": "queued", "worker": None, "lease": None, "attempts": JOBS.c.attempts - 1}
        with self.writing(durable=False) as connection:
            return connection.execute(update(JOBS).where(*_held(worker)).values(**values)).rowcount

    def put_back_lost(self, me: str) -> int:
        """Put what nobody draws any more back into the queue: jobs whose lease has run out, and those of workers of
        this place that are no more; tell how many."""
        running, now = JOBS.c.state == "running", time.time()
        with self.reading() as connection:
            leases = select(JOBS.c.worker, func.min(JOBS.c.lease)).where(running).group_by(JOBS.c.worker)
            workers = connection.execute(leases).tuples().all()
        dead = [worker for worker, _ in workers if worker and _is_dead(worker, me)]
        if not dead and not any(lease is not None and lease < now for _, lease in workers):
            return 0
        lost = (JOBS.c.lease < now) | JOBS.c.worker.in_(dead)
        values = {"state": "queued", "worker": None, "lease": None}
        with self.writing(durable=False) as connection:
            return connection.execute(update(JOBS).where(running, lost).values(**values)).rowcount

    def _end(self, *where: Any, **values: Any) -> bool:
        values |= {"finished": time.time(), "worker": None, "lease": None}
        with self.writing() as connection:
            return connection.execute(update(JOBS).where(*where).values(**values)).rowcount == 1

    # Tokens

    def add_token(self, name: str, digest: str) -> None:
        """Let somebody in. Raises RunError where there is one of that name."""
        try:
            with self.writing() as connection:
                connection.execute(insert(TOKENS).values(name=name, digest=digest, created=time.time()))
        except IntegrityError:
            raise RunError(f"There is a token for {name} already; remove it first, or choose another name.") from None

    def remove_token(self, name: str) -> bool:
        """Let somebody in no more; tell whether there was one of that name."""
        with self.writing() as connection:
            return connection.execute(delete(TOKENS).where(TOKENS.c.name == name)).rowcount == 1

    def tokens(self) -> list[tuple[str, float]]:
        """Name of each, and when it was made, by name."""
        with self.reading() as connection:
            rows = connection.execute(select(TOKENS.c.name, TOKENS.c.created).order_by(TOKENS.c.name))
            return [(name, created) for name, created in rows]

    def token_of(self, digest: str) -> str | None:
        """The name behind a token."""
        with self.reading() as connection:
            name: str | None = connection.scalar(select(TOKENS.c.name).where(TOKENS.c.digest == digest))
            return name


def _check(connection: Connection, owner: str, now: float, *, queue: int, rate: int, open_jobs: int) -> None:
    """Raise QueueFull where all, or the owner, have as many jobs as they may."""
    if owner:
        own = UNFINISHED.where(JOBS.c.owner == owner)
        if connection.scalar(own) >= open_jobs:  # type: ignore[operator]
            raise QueueFull(f"{open_jobs} jobs of this token are open; wait for one to end.", 5, own=True)
        recent = select(JOBS.c.created).where(JOBS.c.owner == owner, JOBS.c.created > now - 60)
        oldest = connection.scalar(recent.order_by(JOBS.c.created.desc()).offset(rate - 1).limit(1))
        if oldest is not None:
            raise QueueFull(f"This token began {rate} jobs within a minute.", oldest + 60 - now, own=True)
    if connection.scalar(UNFINISHED) >= queue:  # type: ignore[operator]
        raise QueueFull(f"{queue} jobs wait already; come back later.", 30, own=False)


def _job(row: Row[Any]) -> JobRow:
    return JobRow(**row._asdict())


def _image(row: Row[Any]) -> ImageRow:
    return ImageRow(**row._asdict())


def _owned(owner: str | None) -> tuple[Any, ...]:
    return () if owner is None else (JOBS.c.owner == owner,)
