"""The queue, in SQLite and in PostgreSQL: order, leases, batches, limits, and that a job ends once."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limner.errors import ConfigError, RunError

pytest.importorskip("sqlalchemy")
from sqlalchemy import insert, text

from limner.serving.store import Kept, QueueFull, Store, new_id, worker_id
from limner.serving.tables import JOBS, ImageRow, JobRow
from limner.serving.tokens import digest, new_token

LEASE = 60.0
MODELS = ["m"]


def job(shape: str = "a", owner: str = "", pictures: int = 1, created: float | None = None) -> JobRow:
    """One to add."""
    settings = {"prompt": "A dog.", "seed": 2**63 - 1}
    when = time.time() if created is None else created
    return JobRow(
        id=new_id(), owner=owner, model="m", shape=shape, settings=settings, pictures=pictures, steps=4, created=when
    )


def add(store: Store, row: JobRow, *, queue: int = 100, rate: int = 100, open_jobs: int = 100) -> JobRow:
    """Add it under generous limits."""
    return store.add(row, queue=queue, rate=rate, open_jobs=open_jobs)


def picture(row: JobRow, number: int = 0, **facts: Any) -> ImageRow:
    """One of a job."""
    file = f"{row.id}-{number}.png"
    return ImageRow(id=new_id(), job=row.id, number=number, file=file, width=8, height=8, **facts)


def test_first_come_first_served(store: Store) -> None:
    rows = [add(store, job(shape=str(i))) for i in range(3)]
    assert [store.places([row.number])[row.number] for row in rows] == [0, 1, 2]
    taken = [store.take("w", MODELS, pictures=1, lease=LEASE)[0].id for _ in rows]
    assert taken == [row.id for row in rows]
    assert store.take("w", MODELS, pictures=1, lease=LEASE) == []


def test_jobs_of_models_that_others_have_are_left_to_them(store: Store) -> None:
    rows = [add(store, job()) for _ in range(2)]
    assert store.take("w", ["other"], pictures=2, lease=LEASE) == []
    taken = store.take("w", ["other", "m"], pictures=2, lease=LEASE)
    assert [row.id for row in taken] == [row.id for row in rows]


def test_jobs_without_pictures_hide_none_that_have_some(store: Store) -> None:
    drawn = add(store, job(pictures=2))
    store.take("w", MODELS, pictures=2, lease=LEASE)
    for number in range(2):
        store.keep("w", picture(drawn, number), step=4)
    waiting = [add(store, job()) for _ in range(3)]
    assert [row.id for row in store.listed(limit=2)] == [waiting[2].id, waiting[1].id]
    assert [row.id for row in store.listed(drawn=True, limit=2)] == [drawn.id]


def test_a_batch_is_of_one_shape_and_no_larger_than_asked(store: Store) -> None:
    rows = [add(store, job(shape, pictures=n)) for shape, n in (("a", 2), ("b", 1), ("a", 3), ("a", 2), ("a", 1))]
    taken = store.take("w", MODELS, pictures=5, lease=LEASE)
    assert [row.number for row in taken] == [rows[0].number, rows[2].number]
    assert [row.number for row in store.take("w", MODELS, pictures=1, lease=LEASE)] == [rows[1].number]


def test_a_job_goes_to_one_of_many_workers(opened: Callable[[], Store], store: Store) -> None:
    rows = [add(store, job()) for _ in range(60)]
    taken: list[str] = []

    def work(worker: str, own: Store) -> None:
        while jobs := own.take(worker, MODELS, pictures=2, lease=LEASE):
            taken.extend(row.id for row in jobs)
            assert all(own.keep(worker, picture(row), step=4) == Kept(last=True) for row in jobs)
        own.close()

    threads = [threading.Thread(target=work, args=(f"w{i}", opened())) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(row.id for row in rows)
    assert store.counts() == {"done": 60}


def test_a_lease_that_ran_out_is_taken_over_and_the_late_one_changes_nothing(store: Store) -> None:
    slow, quick = "elsewhere/1/ab", "elsewhere/2/cd"
    row = add(store, job())
    store.take(slow, MODELS, pictures=1, lease=-1)
    assert store.take(quick, MODELS, pictures=1, lease=LEASE) == []
    assert store.put_back_lost(quick) == 1
    again = store.take(quick, MODELS, pictures=1, lease=LEASE)
    assert (again[0].id, again[0].attempts) == (row.id, 2)
    assert store.renew(slow, {row.id: 3}, LEASE) == set()
    assert store.keep(slow, picture(row), step=4) is None
    assert not store.fail(slow, row.id, "no", fault=True)
    assert store.renew(quick, {row.id: 3}, LEASE) == {row.id}
    assert store.keep(quick, picture(row), step=4) == Kept(last=True)
    assert not store.cancel(row.id, None)
    ended = store.get(row.id)
    assert ended is not None
    assert (ended.state, ended.step, ended.worker) == ("done", 4, None)
    assert len(store.images([row.id])) == 1


def test_of_some_jobs_those_that_have_ended_are_told(store: Store) -> None:
    running, queued, cancelled, other = (add(store, job()) for _ in range(4))
    store.cancel(cancelled.id, None)
    store.cancel(other.id, None)
    assert [row.id for row in store.take("w", MODELS, pictures=1, lease=LEASE)] == [running.id]
    assert store.ended([queued.id, running.id, cancelled.id]) == [cancelled.id]
    assert store.ended([]) == []


def test_a_cancelled_job_keeps_no_picture(store: Store) -> None:
    row = add(store, job())
    store.take("w", MODELS, pictures=1, lease=LEASE)
    assert store.cancel(row.id, 2)
    assert store.keep("w", picture(row), step=4) is None
    assert store.renew("w", {row.id: 3}, LEASE) == set()
    ended = store.get(row.id)
    assert ended is not None
    assert (ended.state, ended.step) == ("cancelled", 2)


def test_what_is_handed_back_is_next_and_nobody_s_fault(store: Store) -> None:
    row, _ = add(store, job("a")), add(store, job("b"))
    store.take("w", MODELS, pictures=1, lease=LEASE)
    assert store.give_back("w") == 1
    again = store.take("v", MODELS, pictures=1, lease=LEASE)[0]
    assert (again.id, again.attempts) == (row.id, 1)


def test_the_dead_of_this_machine_are_known(store: Store) -> None:
    add(store, job())
    me = worker_id()
    host, pid, _ = me.rsplit("/", 2)
    store.take(f"{host}/{pid}/before", MODELS, pictures=1, lease=LEASE)  # the same number, another life
    assert store.put_back_lost(me) == 1
    assert len(store.take(me, MODELS, pictures=1, lease=LEASE)) == 1
    assert store.put_back_lost(me) == 0
    assert store.take("x", MODELS, pictures=1, lease=LEASE) == []
    store.give_back(me)
    store.take("elsewhere/1/ab", MODELS, pictures=1, lease=LEASE)
    assert store.put_back_lost(me) == 0
    assert store.take("x", MODELS, pictures=1, lease=LEASE) == []


@pytest.mark.skipif(sys.platform != "linux", reason="there are no containers elsewhere")
def test_in_another_container_of_the_same_name_our_number_is_another_s(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, job())
    with monkeypatch.context() as there:
        there.setattr(Path, "readlink", lambda _: "pid:[1]")
        other = worker_id()
    store.take(other, MODELS, pictures=1, lease=LEASE)
    assert store.put_back_lost(worker_id()) == 0


def test_limits(store: Store) -> None:
    store.add_token("anna", digest(new_token()))
    now = time.time()
    for i in range(3):
        add(store, job(owner="anna", created=now - 50 + i))
    with pytest.raises(QueueFull) as full:
        add(store, job(owner="anna"), open_jobs=3)
    assert full.value.own
    with pytest.raises(QueueFull) as full:
        add(store, job(owner="anna", created=now), rate=3)
    assert full.value.own
    assert full.value.seconds == pytest.approx(10, abs=0.1)
    with pytest.raises(QueueFull) as full:
        add(store, job(), queue=3)
    assert not full.value.own
    add(store, job(owner="anna", created=now + 10.1), rate=3)


def test_each_sees_its_own(store: Store) -> None:
    row = add(store, job(owner="anna"))
    store.take("w", MODELS, pictures=1, lease=LEASE)
    image = picture(row)
    id_ = image.id
    store.keep("w", image, step=4)
    for owner, sees in ((None, True), ("anna", True), ("ben", False)):
        assert (store.get(row.id, owner) is not None) is sees
        assert (store.image(id_, owner) is not None) is sees
        assert bool(store.listed(owner=owner, limit=5)) is sees


def test_a_job_ends_with_the_last_of_its_pictures_in_whatever_order_they_come(store: Store) -> None:
    row = add(store, job(pictures=3))
    store.take("w", MODELS, pictures=3, lease=LEASE)
    for number in (2, 0):
        assert store.keep("w", picture(row, number), step=2) == Kept(last=False)
        assert store.keep("w", picture(row, number), step=2) is None, "it is there already"
    assert store.keep("w", picture(row, 1), step=2) == Kept(last=True)
    ended = store.get(row.id)
    assert ended is not None
    assert (ended.state, ended.step) == ("done", row.steps)
    assert [image.number for image in store.images([row.id])] == [0, 1, 2]


def test_steps_that_are_told_late_take_nothing_back(store: Store) -> None:
    row = add(store, job(pictures=3))
    store.take("w", MODELS, pictures=3, lease=LEASE)
    told = []
    for step in (2, 1):
        store.renew("w", {row.id: step}, LEASE)
        told.append(store.get(row.id))
    for number, step in enumerate((3, 1)):
        store.keep("w", picture(row, number), step=step)
        told.append(store.get(row.id))
    assert [found and found.step for found in told] == [2, 2, 3, 3]


def test_the_best_stay_when_a_job_ends(store: Store) -> None:
    row = add(store, job(pictures=4))
    store.take("w", MODELS, pictures=4, lease=LEASE)
    scores = (0.1, 0.3, 0.3, 0.2)
    for number, score in enumerate(scores[:3]):
        assert store.keep("w", picture(row, number, score=score), step=number, best=2) == Kept(last=False)
    kept = store.keep("w", picture(row, 3, score=scores[3]), step=4, best=2)
    assert kept is not None
    assert sorted(kept.dropped) == [f"{row.id}-0.png", f"{row.id}-3.png"]
    assert [image.number for image in store.images([row.id])] == [1, 2]


def test_tables_of_an_earlier_version_get_the_new_columns(opened: Callable[[], Store]) -> None:
    before = opened()
    row = add(before, job())
    with before.engine.begin() as connection:
        for column in ("bytes", "score"):
            connection.exec_driver_sql(f"ALTER TABLE images DROP COLUMN {column}")
        values = (f"'{new_id()}'", f"'{row.id}'", "0", "'a.png'", "8", "8")
        connection.exec_driver_sql(
            f"INSERT INTO images (id, job, number, file, width, height) VALUES ({', '.join(values)})"
        )
    before.close()
    after = opened()
    (image,) = after.images([row.id])
    assert (image.file, image.bytes, image.score) == ("a.png", 0, None)
    after.close()


def test_pages_of_the_list(store: Store) -> None:
    numbers = [add(store, job()).number for _ in range(5)]
    first = store.listed(limit=2)
    assert [row.number for row in first] == numbers[:-3:-1]
    assert [row.number for row in store.listed(before=first[-1].number, limit=9)] == numbers[-3::-1]
    assert store.listed(state="done", limit=9) == []


def test_tokens(store: Store) -> None:
    token = new_token()
    store.add_token("anna", digest(token))
    with pytest.raises(RunError, match="already"):
        store.add_token("anna", digest(new_token()))
    assert store.token_of(digest(token)) == "anna"
    assert store.token_of(digest(new_token())) is None
    assert store.remove_token("anna")
    assert not store.remove_token("anna")
    assert store.token_of(digest(token)) is None


@pytest.mark.parametrize("id_", ["", "../x", "\0", "A" * 32, "é" * 32, "0" * 33])
def test_odd_ids_are_not_there(store: Store, id_: str) -> None:
    assert store.get(id_) is None
    assert store.image(id_) is None


def test_many_servers_may_begin_at_once(opened: Callable[[], Store]) -> None:
    errors: list[Exception] = []

    def begin() -> None:
        try:
            opened().close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_ten_thousand_jobs_are_no_hardship(store: Store) -> None:
    with store.writing() as connection:
        rows = [vars(job(shape=str(i % 7))) | {"number": i} for i in range(1, 10_001)]
        connection.execute(insert(JOBS), rows)
        if connection.dialect.name == "postgresql":  # which counts only what it numbered itself
            connection.execute(text("SELECT setval('jobs_number_seq', 10000)"))
    started = time.process_time()
    last = add(store, job(), queue=20_000)
    assert store.places([last.number]) == {last.number: 10_000}
    assert len(store.take("w", MODELS, pictures=8, lease=LEASE)) == 8
    assert len(store.listed(limit=50)) == 50
    assert time.process_time() - started < 1
    with pytest.raises(QueueFull):
        add(store, job(), queue=10_001)


def test_a_folder_in_the_way_is_no_damaged_database(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").mkdir()
    with pytest.raises(ConfigError, match="can't be opened"):
        Store(tmp_path)
