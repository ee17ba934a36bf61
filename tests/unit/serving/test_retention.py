"""Old jobs make room: the oldest go first, with their files, and what has not ended stays."""

from __future__ import annotations

import io
import os
import time
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("sqlalchemy")
from sqlalchemy import insert

from limner.serving.keeper import folder_of
from limner.serving.retention import RECENT, ROW, make_room, taken
from limner.serving.store import Store, new_id
from limner.serving.tables import IMAGES, ImageRow, JobRow
from limner.serving.uploads import FRESH, Uploads

SIZE = 10_000  # bytes of a picture
HOUR = 3600.0


def ended(store: Store, out: Path, *, ago: float, state: str = "done", image: str | None = None) -> JobRow:
    """A job that ended so many seconds ago, with a picture on disk."""
    when = time.time() - ago
    finished = None if state == "queued" else when
    settings = {"prompt": "A dog.", "seed": 1, "image": image, "mask": None}
    row = JobRow(
        id=new_id(),
        owner="",
        model="m",
        shape="a",
        settings=settings,
        pictures=1,
        steps=1,
        created=when,
        state=state,
        finished=finished,
    )
    file = folder_of(out, row.id) / "dog.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(SIZE))
    row = store.add(row, queue=100, rate=100, open_jobs=100)
    name = file.relative_to(out).as_posix()
    image = ImageRow(id=new_id(), job=row.id, number=0, file=name, width=8, height=8, bytes=SIZE)
    with store.writing() as connection:
        connection.execute(insert(IMAGES), vars(image))
    return row


def there(store: Store, out: Path, rows: list[JobRow]) -> list[bool]:
    """Which of the jobs are still there, each with all or nothing."""
    known = [store.get(row.id) is not None for row in rows]
    assert known == [bool(store.images([row.id])) for row in rows]
    assert known == [folder_of(out, row.id).exists() for row in rows]
    return known


def test_the_oldest_go_until_the_rest_fits(store: Store, tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", 1000)
    last = ended(store, tmp_path, ago=HOUR - 4)  # which began first
    rows = [*(ended(store, tmp_path, ago=HOUR - number) for number in range(4)), last]
    assert taken(store, uploads) == 5 * (SIZE + ROW)
    assert make_room(tmp_path, store, uploads, 5 * (SIZE + ROW)) == 0
    assert make_room(tmp_path, store, uploads, 3 * (SIZE + ROW) + 1) == 2
    assert there(store, tmp_path, rows) == [False, False, True, True, True]
    assert make_room(tmp_path, store, uploads, 0) == 3
    assert taken(store, uploads) == 0


def test_what_is_drawn_and_what_has_just_ended_stays(store: Store, tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", 1000)
    states = (("queued", HOUR), ("done", HOUR), ("failed", HOUR), ("cancelled", HOUR), ("done", 1.0))
    rows = [ended(store, tmp_path, ago=ago, state=state) for state, ago in states]
    assert make_room(tmp_path, store, uploads, 0) == 3
    assert there(store, tmp_path, rows) == [True, False, False, False, True]


def test_what_jobs_began_with_goes_with_the_last_of_them(store: Store, tmp_path: Path) -> None:
    uploads, size = Uploads(tmp_path / "uploads", 1000), 50 * SIZE
    rows, digests = [], [str(number) * 64 for number in range(3)]
    for number, digest in enumerate(digests):
        uploads.keep(bytes(size), digest)
        os.utime(tmp_path / "uploads" / digest[:2] / digest, (time.time() - RECENT - 1,) * 2)
        rows += [ended(store, tmp_path, ago=RECENT + 10 - number, image=digest) for _ in range(2)]
    assert taken(store, uploads) == 3 * size + 6 * (SIZE + ROW)
    assert make_room(tmp_path, store, uploads, 2.5 * size) == 2
    assert there(store, tmp_path, rows) == [False] * 2 + [True] * 4
    assert uploads.sizes() == dict.fromkeys(digests[1:], size)


def test_what_no_job_begins_with_goes_once_it_is_not_fresh(store: Store, tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", 1000)
    digests = []
    for colour in ("red", "green", "blue"):
        out = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(out, "PNG")
        digests.append(sha256(out.getvalue()).hexdigest())
        uploads.keep(out.getvalue(), digests[-1])
    files = [tmp_path / "uploads" / digest[:2] / digest for digest in digests]
    files.append(files[0].with_name(f".{digests[0]}.12345678.partial"))  # of a server that was killed
    files[-1].touch()
    for file in files:
        os.utime(file, (time.time() - FRESH - 1,) * 2)
    ended(store, tmp_path, ago=1.0, image=digests[0])
    uploads.keep(
        uploads.read(digests[1], mask=False)[0], digests[1]
    )  # named again, by somebody whose job is about to come
    make_room(tmp_path, store, uploads, 0)
    assert [file.exists() for file in files] == [True, True, False, False]
