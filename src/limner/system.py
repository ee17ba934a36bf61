"""How much memory there is: the machine's, or less where a container or a service has a limit of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil


class Memory(NamedTuple):
    """Bytes."""

    total: int
    free: int
    """What may be taken without pushing others out."""


class _Files(NamedTuple):
    """What a version of Linux's control groups calls its files, and a line of one of them."""

    root: str
    most: str
    taken: str
    dropped: str


V1 = _Files(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)  # cgroup-v1/memory.rst of Linux's documentation
V2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")  # cgroup-v2.rst


def memory(root: Path = Path("/")) -> Memory:
    """What this process may use. `root` is where /proc and /sys lie."""
    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    for limit, taken in _limits(root):
        total, free = min(total, limit), min(free, max(limit - taken, 0))
    return Memory(total, free)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Bytes allowed and bytes taken of each control group that this process is in, from its own up to the root's.

    Files that the kernel read ahead and would drop don't count as taken, as `docker stats` has it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # another system
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        files = V1 if controllers else V2
        top = root / files.root
        own = top / path.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(top):
                break
            try:
                limit = int((group / files.most).read_text())  # "max" where there is none
                taken = int((group / files.taken).read_text())
                rows = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue  # a container shows its own group as the root, under none of the names that the host uses
            yield limit, taken - int(rows.get(files.dropped, 0))
