"""Room on the disk: the jobs that ended longest ago go, with their pictures, and what no job begins with any more."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path

from sqlalchemy import delete, func, select

from limner.serving.keeper import folder_of
from limner.serving.store import Store
from limner.serving.tables import IMAGES, JOBS, OPEN
from limner.serving.uploads import Uploads

ROW = 4096  # bytes that a job takes in the database, about
RECENT = 60  # seconds that an ended job stays, whatever it takes, for those who wait for it
AT_ONCE = 100  # jobs removed in one transaction
IMAGE, MASK = (JOBS.c.settings[name].as_string() for name in ("image", "mask"))


def make_room(out: Path, store: Store, uploads: Uploads, room: float) -> int:
    """Remove what is oldest until the rest takes no more than `room` bytes. -> the jobs that were removed.

    Jobs that have not ended stay. Files go before their rows, so that one who is killed meanwhile leaves nothing that
    nobody knows. Raises SQLAlchemyError and OSError.
    """
    removed = 0
    while taken(store, uploads) > room:
        begun_with = _begun_with(store)
        uploads.remove_others(begun_with)
        jobs = _oldest(store, uploads, begun_with, taken(store, uploads) - room)
        if not jobs:
            break
        for job in jobs:
            shutil.rmtree(folder_of(out, job), ignore_errors=True)
        with store.writing() as connection:
            connection.execute(delete(IMAGES).where(IMAGES.c.job.in_(jobs)))
            connection.execute(delete(JOBS).where(JOBS.c.id.in_(jobs)))
        removed += len(jobs)
    return removed


def taken(store: Store, uploads: Uploads) -> int:
    """Bytes that jobs, their pictures and what they began with take."""
    with store.reading() as connection:
        pictures = connection.scalar(select(func.coalesce(func.sum(IMAGES.c.bytes), 0))) or 0
        jobs = connection.scalar(select(func.count()).select_from(JOBS)) or 0
    return int(pictures) + jobs * ROW + sum(uploads.sizes().values())


def _oldest(store: Store, uploads: Uploads, begun_with: Counter[str], excess: float) -> list[str]:
    """Jobs that ended, as many as take about `excess` bytes, with what then no job begins with any more.

    `begun_with` is what all jobs begin with.
    """
    size, sizes, later = func.coalesce(func.sum(IMAGES.c.bytes), 0), uploads.sizes(), begun_with.copy()
    ended = select(JOBS.c.id, IMAGE, MASK, size).outerjoin(IMAGES, IMAGES.c.job == JOBS.c.id)
    ended = ended.where(JOBS.c.state.not_in(OPEN), JOBS.c.finished < time.time() - RECENT)
    ended = ended.group_by(JOBS.c.number).order_by(JOBS.c.finished, JOBS.c.number).limit(AT_ONCE)
    jobs = []
    with store.reading() as connection:
        for job, image, mask, pictures in connection.execute(ended):
            if excess <= 0:
                break
            jobs.append(job)
            own = {image, mask} - {None}
            later.subtract(own)
            excess -= int(pictures) + ROW + sum(sizes.get(digest, 0) for digest in own if not later[digest])
    return jobs


def _begun_with(store: Store) -> Counter[str]:
    """How many jobs begin with each picture or mask, by digest."""
    with store.reading() as connection:
        rows = connection.execute(select(IMAGE, MASK).where(IMAGE.is_not(None)))
        return Counter(digest for row in rows for digest in {*row} - {None})
