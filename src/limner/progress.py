"""A progress bar with rate and time left; a plain line now and then where the output is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 30.0  # seconds between lines in a log file


@contextmanager
def progress(what: str, total: int, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how much of `total` is done; yields a function to call with each further amount."""
    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f}/s"),
        TimeRemainingColumn(),
    )
    started = last = time.monotonic()
    now_done = done
    # Otherwise rich sends what is printed meanwhile to the terminal, also where stdout is a file or a pipe.
    with Progress(
        *columns, console=console, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty()
    ) as bar:
        task = bar.add_task(what, total=total, completed=done, rate=0.0)

        def advance(amount: int) -> None:
            nonlocal now_done, last
            now_done += amount
            now = time.monotonic()
            rate = (now_done - done) / max(now - started, 1e-9)
            bar.update(task, completed=now_done, rate=rate)
            if not console.is_terminal and (now - last > LINE_EVERY or now_done >= total):
                last = now
                left = (total - now_done) / max(rate, 1e-9)
                console.print(f"{what} {now_done}/{total}  {rate:.1f}/s  {max(left, 0):.0f} s left")

        yield advance
