"""Pictures are drawn side by side on a CPU, each with no more threads than its networks keep busy."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

from limner.threads import available, pool_of

T = TypeVar("T")
R = TypeVar("R")

BUSY = 2e10
"""Parameters times places that keep one thread busy: with more threads the wait for the last of them costs as much as
they bring, at each of some hundred layers. Four times what Limner's own model has (docs/decisions/0008)."""
AHEAD = 2  # pictures a lane that are begun before the first of them is taken


class Ended(Exception):
    """Ends a drawing whose pictures nobody takes any more, at its next step."""


def threads_for(parameters: int, places: int) -> int:
    """How many threads draw one picture, of a U-Net with so many parameters, on so many places of latents.

    It depends on nothing else but the threads that there are, as the last bits of a picture depend on it.
    """
    return max(1, min(available(), math.ceil(parameters * places / BUSY)))


def lanes(threads: int) -> int:
    """How many pictures are drawn at once, by so many threads each."""
    return available() // threads


def side_by_side(
    draw: Callable[[T, Callable[[], None]], R], todo: Sequence[T], threads: int, ahead: int = AHEAD
) -> Iterator[R]:
    """What `draw` makes of each, in their order, several at once by so many threads of torch's each, and `ahead` a lane
    begun before the first of them is taken; with 1, one lane rests while its picture is looked at.

    `draw` is also given what to call now and then, which ends it where nobody goes on with the iterator, or another
    has failed. Raises what the first one to fail has raised.
    """
    pool, ended = pool_of(lanes(threads), threads), threading.Event()
    failures: list[BaseException] = []

    def check() -> None:
        if ended.is_set():
            raise Ended

    def attempt(one: T) -> R:
        try:
            return draw(one, check)
        except BaseException as error:
            failures.append(error)
            ended.set()
            raise

    def first() -> R:
        try:
            return begun.popleft().result()
        except Ended:
            raise failures[0] from None

    begun: deque[Future[R]] = deque()
    try:
        for one in todo:
            begun.append(pool.submit(attempt, one))
            if len(begun) == ahead * lanes(threads):
                yield first()
        while begun:
            yield first()
    finally:
        ended.set()
        for future in begun:
            future.cancel()
        wait(begun)
