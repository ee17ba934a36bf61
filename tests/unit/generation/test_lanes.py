"""Several pictures at once, and the same ones however many threads there are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limner.generation import lanes
from limner.generation.model import Model

Check = Callable[[], None]


@pytest.fixture
def four_threads() -> Iterator[None]:
    """As on a machine with four cores; the tests' own are one."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def until_ended(check: Check) -> None:
    """What a drawing does that nobody ends."""
    for _ in range(1000):
        check()
        time.sleep(0.01)
    pytest.fail("nobody ended it")


@given(st.integers(1, 10**10), st.integers(1, 10**6))
def test_more_work_has_more_threads_and_never_more_than_there_are(parameters: int, places: int) -> None:
    threads = lanes.threads_for(parameters, places)
    assert 1 <= threads <= lanes.threads_for(2 * parameters, places) <= torch.get_num_threads()
    assert threads * lanes.lanes(threads) <= torch.get_num_threads()


def test_the_built_in_model_has_one_thread_and_a_large_one_has_all(four_threads: None) -> None:
    assert lanes.threads_for(21_000_000, 16 * 16) == 1
    assert lanes.threads_for(860_000_000, 64 * 64) == 4


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_as_many_at_once_as_there_are_threads_for_and_in_order(four_threads: None, threads: int) -> None:
    together, at_once = threading.Barrier(4 // threads, timeout=60), []

    def draw(number: int, check: Check) -> int:
        check()
        at_once.append(torch.get_num_threads())
        together.wait()  # which fails where fewer are drawn at once
        time.sleep(0.01 * (number % 3))
        return number

    todo = range(8)
    assert list(lanes.side_by_side(draw, todo, threads)) == list(todo)
    assert set(at_once) == {threads}
    assert torch.get_num_threads() == 4
    elsewhere: list[int] = []
    other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert elsewhere == [4], "others keep the threads that they had"


def test_one_that_fails_ends_the_others(four_threads: None) -> None:
    def draw(number: int, check: Check) -> int:
        if number == 2:
            time.sleep(0.1)
            raise ArithmeticError
        if number:
            until_ended(check)
        return number

    drawn = lanes.side_by_side(draw, range(6), 1)
    assert next(drawn) == 0
    with pytest.raises(ArithmeticError):
        next(drawn)


def test_what_nobody_waits_for_is_ended(four_threads: None) -> None:
    begun: list[int] = []

    def draw(number: int, check: Check) -> int:
        begun.append(number)
        if number:
            until_ended(check)
        return number

    drawn = lanes.side_by_side(draw, range(100), 1)
    assert next(drawn) == 0
    drawn.close()  # type: ignore[attr-defined]
    assert len(begun) < 20


def test_pictures_do_not_depend_on_how_many_threads_there_are(folder: Path, four_threads: None) -> None:
    model = Model.load(str(folder), "cpu", precision="fp32")
    steps: list[int] = []
    pictures = model("A dog.", n=5, steps=3, seed=7, on_step=steps.append).pictures
    assert sum(steps) == 15
    torch.set_num_threads(1)
    for number, picture in enumerate(pictures):
        [alone] = model("A dog.", steps=3, seed=7 + number).pictures
        assert picture.image.tobytes() == alone.image.tobytes()
        assert picture.record == alone.record


def test_a_caller_that_stops_stops_all(folder: Path, four_threads: None) -> None:
    model = Model.load(str(folder), "cpu", precision="fp32")
    steps: list[int] = []

    def stop(done: int) -> None:
        steps.append(done)
        if len(steps) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model("A dog.", n=50, steps=500, on_step=stop)
    assert len(steps) < 20


def test_with_none_ahead_one_lane_rests_while_its_picture_is_looked_at(four_threads: None) -> None:
    begun: list[int] = []

    def draw(number: int, check: Check) -> int:
        begun.append(number)
        return number

    for number in lanes.side_by_side(draw, range(4), 4, ahead=1):
        time.sleep(0.02)
        assert begun == list(range(number + 1))
