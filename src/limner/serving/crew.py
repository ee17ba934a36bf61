"""Threads that draw side by side, as many at once as there are lanes, and keep what is drawn beside the next."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

KEEPING = 4  # threads beside those that draw


class Lane:
    """Room for one drawing, which says how far it is with it."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self.ending = self.free = False

    def end_soon(self) -> None:
        """Let the next be chosen meanwhile."""
        with self._changed:
            self.ending = True
            self._changed.notify()

    def leave(self) -> None:
        """Let the next begin."""
        with self._changed:
            self.ending = self.free = True
            self._changed.notify()


class Crew:
    """For one thread, which gives it what to do."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor((os.cpu_count() or 1) + KEEPING, "draw")
        self._begun: list[Future[None]] = []
        self._changed = threading.Condition()
        self._taken: list[Lane] = []
        self._lanes = 1

    def share_out(self, lanes: int) -> None:
        """Let so many draw at once from now on. Raises as `finish`."""
        if lanes != self._lanes:
            self.finish()
            self._lanes = lanes

    def begin(self, act: Callable[[Lane], None]) -> None:
        """Do this in a thread once a lane is free, which it may leave before it ends."""
        self._await(lambda lane: lane.free)
        lane = Lane(self._changed)
        self._taken.append(lane)
        self._begun.append(self._threads.submit(self._do, act, lane))

    def _do(self, act: Callable[[Lane], None], lane: Lane) -> None:
        try:
            act(lane)
        finally:
            lane.leave()

    def wait(self) -> None:
        """Until a lane is free or soon will be. Raises what something that has ended by then raised."""
        self._await(lambda lane: lane.ending)
        self._hear()

    def _await(self, gone: Callable[[Lane], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: sum(not gone(lane) for lane in self._taken) < self._lanes)
            self._taken = [lane for lane in self._taken if not lane.free]

    def finish(self) -> None:
        """Until all that was begun has ended. Raises what the first that failed raised."""
        wait(self._begun)
        self._hear()

    def _hear(self) -> None:
        ended = [one for one in self._begun if one.done()]
        self._begun = [one for one in self._begun if one not in ended]
        for one in ended:
            one.result()

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.shutdown()
