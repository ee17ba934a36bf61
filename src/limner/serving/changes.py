"""Who waits for a job hears from the thread that draws it."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Waiter:
    """Woken at each change of a job. Belongs to the event loop that made it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # its loop has closed
            self._loop.call_soon_threadsafe(self._changed.set)

    async def wait(self, seconds: float | None = None) -> None:
        """Until the next change since the last wait ended, or for so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)
        self._changed.clear()


class Changes:
    """The waiters of each job."""

    def __init__(self) -> None:
        self._waiters: dict[tuple[str, bool], set[Waiter]] = defaultdict(set)
        self._lock = threading.RLock()  # a signal to end may come to a thread that has it, and wakes everybody

    @contextmanager
    def of(self, job: str, *, steps: bool) -> Iterator[Waiter]:
        """A waiter for the changes of a job from now on, also its single steps or not."""
        waiter, key = Waiter(), (job, steps)
        with self._lock:
            self._waiters[key].add(waiter)
        try:
            yield waiter
        finally:
            with self._lock:
                self._waiters[key].discard(waiter)
                if not self._waiters[key]:
                    del self._waiters[key]

    def followed(self, job: str) -> bool:
        """Whether somebody waits for the steps of a job."""
        return (job, True) in self._waiters

    def awaited(self) -> set[str]:
        """The jobs whose end somebody waits for."""
        with self._lock:
            return {job for job, _ in self._waiters}

    def tell(self, job: str, *, step: bool = False) -> None:
        """Wake those who wait for a job; for a step of it, those only who want to know."""
        with self._lock:
            keys = [(job, True)] if step else [(job, True), (job, False)]
            waiters = [waiter for key in keys for waiter in self._waiters.get(key, ())]
        for waiter in waiters:
            waiter.wake()

    def tell_all(self) -> None:
        """Wake everybody."""
        with self._lock:
            waiters = [waiter for some in self._waiters.values() for waiter in some]
        for waiter in waiters:
            waiter.wake()
