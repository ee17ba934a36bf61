"""The threads that draw: as many at once as there are lanes, and what goes wrong in them is heard."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("sqlalchemy")
from limner.serving.crew import Crew, Lane

SOON = 10.0  # seconds in which what is expected must happen


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.close()


def test_no_more_at_once_than_lanes_and_keeping_is_not_drawing(crew: Crew) -> None:
    crew.share_out(2)
    lock, drawing, most = threading.Lock(), 0, 0
    together, kept = threading.Barrier(2), []
    later_kept = threading.Barrier(4)  # of the two that draw last, and the first two, which wait for them

    def act(number: int, lane: Lane) -> None:
        nonlocal drawing, most
        with lock:
            drawing += 1
            most = max(most, drawing)
        together.wait(SOON)  # which two must reach
        with lock:
            drawing -= 1
        lane.leave()
        if number >= 2:
            kept.append(number)
        later_kept.wait(SOON)
        if number < 2:  # still keeping while the others drew
            kept.append(number)

    for number in range(4):
        crew.begin(lambda lane, number=number: act(number, lane))  # type: ignore[misc]
    crew.finish()
    assert (most, sorted(kept)) == (2, [0, 1, 2, 3])
    assert set(kept[:2]) == {2, 3}


def test_what_fails_is_heard_once_and_its_lane_is_free(crew: Crew) -> None:
    def fail(_: Lane) -> None:
        raise OSError("full")

    done = threading.Event()
    crew.begin(fail)
    crew.begin(lambda _: done.set())  # whoever begins this has counted on it
    with pytest.raises(OSError, match="full"):
        crew.finish()
    crew.wait()
    assert done.is_set()


def test_another_number_of_lanes_waits_for_what_is_drawn(crew: Crew) -> None:
    ended = []
    pause = threading.Event()

    def slow(_: Lane) -> None:
        pause.wait(0.2)
        ended.append("slow")

    crew.begin(slow)
    crew.share_out(3)
    assert ended == ["slow"]


def test_the_next_may_be_chosen_before_a_lane_is_free_but_not_begun(crew: Crew) -> None:
    soon, free = threading.Event(), threading.Event()
    told: list[str] = []

    def first(lane: Lane) -> None:
        soon.wait(SOON)
        lane.end_soon()
        free.wait(SOON)
        told.append("first ends")

    crew.begin(first)
    threading.Timer(0.1, soon.set).start()
    crew.wait()
    assert soon.is_set()
    told.append("chosen")
    threading.Timer(0.1, free.set).start()
    crew.begin(lambda _: told.append("second"))
    crew.finish()
    assert told == ["chosen", "first ends", "second"]
