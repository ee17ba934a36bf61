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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import bindparam, case, delete, func, select, text, update
from sqlalchemy.engine import CursorResult
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from limner.errors import RunError
from limner.serving.database import opened
from limner.serving.tables import OPEN, ImageRow, JobRow, State, TokenRow

ID = re.compile("[0-9a-f]{32}")
BEST_FIRST = (ImageRow.score.desc(), ImageRow.number)


def _held(worker: Any) -> tuple[Any, ...]:
    return JobRow.worker == worker, JobRow.state == "running"


# What every picture needs is written once: that takes SQLAlchemy as long as asking does
UNFINISHED = select(func.count()).where(JobRow.state.in_(OPEN))
NEXT = (
    select(JobRow)
    .where(JobRow.state == "queued", JobRow.model.in_(bindparam("models", expanding=True)))
    .order_by(JobRow.number)
    .with_for_update(skip_locked=True)
    .limit(1)
)
HELD = select(JobRow).where(JobRow.id == bindparam("job"), *_held(bindparam("worker"))).with_for_update()
JOB = select(JobRow).where(JobRow.id == bindparam("job"))
NUMBERS = select(ImageRow.number).where(ImageRow.job == bindparam("job"))
IMAGES = select(ImageRow).where(ImageRow.job == bindparam("job")).order_by(*BEST_FIRST)


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
    return f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"


def _is_dead(worker: str, me: str) -> bool:
    """Whether a worker of this machine is no more; what runs elsewhere is only known by its lease."""
    host, pid, _ = worker.rsplit("/", 2)
    if host != socket.gethostname() or worker == me:
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
        self.engine, self.aside = opened(folder, url)
        """`aside` is where a damaged database was moved to, if there was one."""
        # SQLite has one writer at a time, and those that wait would look again only now and then
        self._turn: AbstractContextManager[Any] = (
            threading.Lock() if self.engine.dialect.name == "sqlite" else nullcontext()
        )

    @contextmanager
    def session(self, *, write: bool, durable: bool = True) -> Iterator[Session]:
        """A transaction. One that is not durable outlives the server, but may be lost when the machine dies."""
        options = {"write": write, "durable": durable}
        with (
            self._turn if write else nullcontext(),
            Session(self.engine.execution_options(**options), expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def close(self) -> None:
        """Let go of the connections."""
        self.engine.dispose()

    def ping(self) -> None:
        """Raise OperationalError where the database does not answer."""
        with self.session(write=False) as session:
            session.execute(text("SELECT 1"))

    # What clients do

    def add(self, job: JobRow, *, queue: int, rate: int, open_jobs: int) -> JobRow:
        """Store a new job. Raises QueueFull where all, or its owner, have as many as they may.

        `queue` and `open_jobs` count unfinished jobs of all and of the owner, `rate` is the owner's new ones a minute.
        """
        with self.session(write=True) as session:
            if job.owner:
                session.execute(select(TokenRow).where(TokenRow.name == job.owner).with_for_update())
            _check(session, job.owner, job.created, queue=queue, rate=rate, open_jobs=open_jobs)
            session.add(job)
        return job

    def check(self, owner: str, *, queue: int, rate: int, open_jobs: int) -> None:
        """Raise QueueFull where `add` would now."""
        with self.session(write=False) as session:
            _check(session, owner, time.time(), queue=queue, rate=rate, open_jobs=open_jobs)

    def get(self, id_: str, owner: str | None = None) -> JobRow | None:
        """A job, if it is the owner's; of anybody for None."""
        if not ID.fullmatch(id_):
            return None
        with self.session(write=False) as session:
            return session.scalar(select(JobRow).where(JobRow.id == id_, *_owned(owner)))

    def places(self, numbers: Collection[int]) -> dict[int, int]:
        """How many queued jobs stand before each of those of these numbers that are queued."""
        if not numbers:
            return {}
        before = (func.row_number().over(order_by=JobRow.number) - 1).label("before")
        queue = select(JobRow.number, before).where(JobRow.state == "queued").subquery()
        with self.session(write=False) as session:
            rows = session.execute(select(queue.c.number, queue.c.before).where(queue.c.number.in_(numbers)))
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
        wanted = select(JobRow).where(*_owned(owner))
        if drawn:
            wanted = wanted.where(select(ImageRow.id).where(ImageRow.job == JobRow.id).exists())
        if state is not None:
            wanted = wanted.where(JobRow.state == state)
        if before is not None:
            wanted = wanted.where(JobRow.number < before)
        with self.session(write=False) as session:
            return session.scalars(wanted.order_by(JobRow.number.desc()).limit(limit)).all()

    def images(self, jobs: Collection[str]) -> Sequence[ImageRow]:
        """The pictures of some jobs, the best first or else in the order of their numbers."""
        if not jobs:
            return []
        with self.session(write=False) as session:
            wanted = select(ImageRow).where(ImageRow.job.in_(jobs)).order_by(ImageRow.job, *BEST_FIRST)
            return session.scalars(wanted).all()

    def with_images(self, id_: str) -> tuple[JobRow, Sequence[ImageRow]]:
        """A job that is there, and its pictures, the best first or else in the order of their numbers."""
        with self.session(write=False) as session:
            return session.scalars(JOB, {"job": id_}).one(), session.scalars(IMAGES, {"job": id_}).all()

    def image(self, id_: str, owner: str | None = None) -> ImageRow | None:
        """A picture, if its job is the owner's."""
        if not ID.fullmatch(id_):
            return None
        with self.session(write=False) as session:
            wanted = select(ImageRow).join(JobRow, JobRow.id == ImageRow.job)
            return session.scalar(wanted.where(ImageRow.id == id_, *_owned(owner)))

    def cancel(self, id_: str, step: int | None) -> bool:
        """End a job that has not ended, at a step where that is known; tell whether that was so."""
        known = {} if step is None else {"step": step}
        return self._end(JobRow.id == id_, JobRow.state.in_(OPEN), state="cancelled", **known)

    def ended(self, jobs: Collection[str]) -> Sequence[str]:
        """Those of these jobs that have ended, or were never there."""
        if not jobs:
            return []
        with self.session(write=False) as session:
            still = session.scalars(select(JobRow.id).where(JobRow.id.in_(jobs), JobRow.state.in_(OPEN)))
            return [*set(jobs).difference(still)]

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        with self.session(write=False) as session:
            rows = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state))
            return dict(rows.tuples().all())

    # What workers do

    def take(self, worker: str, models: Collection[str], *, pictures: int, lease: float) -> Sequence[JobRow]:
        """The job that is next of these models, and further ones of its shape with up to so many pictures in all, for
        `lease` seconds."""
        now = time.time()
        with self.session(write=True, durable=False) as session:
            jobs = list(session.scalars(NEXT, {"models": list(models)}))
            first = jobs[0] if jobs else None
            room = pictures - first.pictures if first else 0
            if first and room > 0:
                alike = NEXT.where(JobRow.shape == first.shape, JobRow.number != first.number).limit(room)
                for job in session.scalars(alike, {"models": list(models)}):
                    if job.pictures <= room:
                        jobs.append(job)
                        room -= job.pictures
            for job in jobs:
                job.state, job.worker, job.lease = "running", worker, now + lease
                job.attempts += 1
                job.started = job.started or now
        return jobs

    def renew(self, worker: str, steps: dict[str, int], lease: float) -> set[str]:
        """Renew the leases of jobs and note their steps; tell which of them the worker still holds."""
        if not steps:
            return set()
        with self.session(write=True, durable=False) as session:
            held = (JobRow.worker == worker, JobRow.state == "running", JobRow.id.in_(steps))
            further = [((JobRow.id == id_) & (JobRow.step < step), step) for id_, step in steps.items()]
            values = {"lease": time.time() + lease, "step": case(*further, else_=JobRow.step)}
            session.execute(update(JobRow).where(*held).values(**values))
            return set(session.scalars(select(JobRow.id).where(*held)))

    def keep(self, worker: str, image: ImageRow, *, step: int, best: int | None = None) -> Kept | None:
        """Add a picture to a job that the worker holds, which ends when all are there, and then has its `best` ones
        only; None where the worker doesn't hold the job, or the picture is there already."""
        with self.session(write=True) as session:
            job = session.scalar(HELD, {"job": image.job, "worker": worker})
            if job is None:
                return None
            there = set(session.scalars(NUMBERS, {"job": job.id}))
            if image.number in there:
                return None
            session.add(image)
            job.step = max(job.step, step)  # a later one may have been told meanwhile
            if len(there) + 1 < job.pictures:
                return Kept(last=False)
            job.state, job.step, job.finished, job.worker, job.lease = "done", job.steps, time.time(), None, None
            if best is None:
                return Kept(last=True)
            session.flush()
            ranked = select(ImageRow).where(ImageRow.job == job.id).order_by(*BEST_FIRST)
            others = session.scalars(ranked.offset(best)).all()
            for other in others:
                session.delete(other)
            return Kept(last=True, dropped=[other.file for other in others])

    def fail(self, worker: str, id_: str, error: str, *, fault: bool) -> bool:
        """End a job that the worker holds, saying why and whose fault it is; tell whether it held it."""
        return self._end(JobRow.id == id_, *_held(worker), state="failed", error=error, fault=fault)

    def give_back(self, worker: str) -> int:
        """Put all jobs that the worker holds back into the queue, without blame; tell how many."""
        with self.session(write=True, durable=False) as session:
            values = {"state": "queued", "worker": None, "lease": None, "attempts": JobRow.attempts - 1}
            done = session.execute(update(JobRow).where(*_held(worker)).values(**values))
            return _count(done)

    def put_back_lost(self, me: str) -> int:
        """Put what nobody draws any more back into the queue: jobs whose lease has run out, and those of workers of
        this machine that are no more; tell how many."""
        running, now = JobRow.state == "running", time.time()
        with self.session(write=False) as session:
            leases = select(JobRow.worker, func.min(JobRow.lease)).where(running).group_by(JobRow.worker)
            workers = session.execute(leases).tuples().all()
        dead = [worker for worker, _ in workers if worker and _is_dead(worker, me)]
        if not dead and not any(lease is not None and lease < now for _, lease in workers):
            return 0
        lost = (JobRow.lease < now) | JobRow.worker.in_(dead)
        with self.session(write=True, durable=False) as session:
            values = {"state": "queued", "worker": None, "lease": None}
            return _count(session.execute(update(JobRow).where(running, lost).values(**values)))

    def _end(self, *where: Any, **values: Any) -> bool:
        values |= {"finished": time.time(), "worker": None, "lease": None}
        with self.session(write=True) as session:
            return _count(session.execute(update(JobRow).where(*where).values(**values))) == 1

    # Tokens

    def add_token(self, name: str, digest: str) -> None:
        """Let somebody in. Raises RunError where there is one of that name."""
        try:
            with self.session(write=True) as session:
                session.add(TokenRow(name=name, digest=digest, created=time.time()))
        except IntegrityError:
            raise RunError(f"There is a token for {name} already; remove it first, or choose another name.") from None

    def remove_token(self, name: str) -> bool:
        """Let somebody in no more; tell whether there was one of that name."""
        with self.session(write=True) as session:
            return _count(session.execute(delete(TokenRow).where(TokenRow.name == name))) == 1

    def tokens(self) -> Sequence[TokenRow]:
        """All, by name."""
        with self.session(write=False) as session:
            return session.scalars(select(TokenRow).order_by(TokenRow.name)).all()

    def token_of(self, digest: str) -> str | None:
        """The name behind a token."""
        with self.session(write=False) as session:
            return session.scalar(select(TokenRow.name).where(TokenRow.digest == digest))


def _check(session: Session, owner: str, now: float, *, queue: int, rate: int, open_jobs: int) -> None:
    """Raise QueueFull where all, or the owner, have as many jobs as they may."""
    if owner:
        own = select(func.count()).where(JobRow.owner == owner)
        if session.scalar(own.where(JobRow.state.in_(OPEN))) >= open_jobs:  # type: ignore[operator]
            raise QueueFull(f"{open_jobs} jobs of this token are open; wait for one to end.", 5, own=True)
        recent = select(JobRow.created).where(JobRow.owner == owner, JobRow.created > now - 60)
        oldest = session.scalar(recent.order_by(JobRow.created.desc()).offset(rate - 1).limit(1))
        if oldest is not None:
            raise QueueFull(f"This token began {rate} jobs within a minute.", oldest + 60 - now, own=True)
    if session.scalar(UNFINISHED) >= queue:  # type: ignore[operator]
        raise QueueFull(f"{queue} jobs wait already; come back later.", 30, own=False)


def _owned(owner: str | None) -> tuple[Any, ...]:
    return () if owner is None else (JobRow.owner == owner,)


def _count(result: Any) -> int:
    assert isinstance(result, CursorResult)
    return result.rowcount
