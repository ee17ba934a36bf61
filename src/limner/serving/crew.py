"""Threads that draw side by side, as many at once as there are lanes, and keep what is drawn beside the next."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

KEEPING = 4  # threads beside those that draw


class Crew:
    """For one thread, which gives it what to do."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor((os.cpu_count() or 1) + KEEPING, "draw")
        self._begun: list[Future[None]] = []
        self._free = threading.Condition()
        self._drawing, self._lanes = 0, 1

    def share_out(self, lanes: int) -> None:
        """Let so many draw at once from now on. Raises as `finish`."""
        if lanes != self._lanes:
            self.finish()
            self._lanes = lanes

    def begin(self, act: Callable[[Callable[[], None]], None]) -> None:
        """Do this in a thread once a lane is free; it is given what frees the lane before it ends."""
        self._await_lane()
        with self._free:
            self._drawing += 1
        self._begun.append(self._threads.submit(self._do, act))

    def _do(self, act: Callable[[Callable[[], None]], None]) -> None:
        with ExitStack() as lane:
            lane.callback(self._leave)
            act(lane.close)

    def _leave(self) -> None:
        with self._free:
            self._drawing -= 1
            self._free.notify()

    def wait(self) -> None:
        """Until a lane is free. Raises what something that has ended by then raised."""
        self._await_lane()
        self._hear()

    def _await_lane(self) -> None:
        with self._free:
            self._free.wait_for(lambda: self._drawing < self._lanes)

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
