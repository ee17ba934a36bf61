"""The memory that may be used is the least of the machine's and of every control group's above."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from limner import system

MB = 1_000_000


def group(folder: Path, most: str, taken: int, dropped: int, version: int) -> None:
    """Write what the kernel shows of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{taken}\n")
    (folder / "memory.stat").write_text(f"anon 12\n{names[2]} {dropped}\n")


def said(root: Path, line: str) -> None:
    """What the process is told of its own group."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(f"9:pids:/else\n{line}\n")


@pytest.mark.parametrize(
    ("version", "line", "top"), [(1, "4:memory:/a/b", "sys/fs/cgroup/memory"), (2, "0::/a/b", "sys/fs/cgroup")]
)
def test_the_least_of_all_groups_counts(tmp_path: Path, version: int, line: str, top: str) -> None:
    said(tmp_path, line)
    group(tmp_path / top / "a" / "b", str(64 * MB), 50 * MB, 10 * MB, version)
    assert system.memory(tmp_path) == (64 * MB, 24 * MB)
    group(tmp_path / top / "a", str(80 * MB), 79 * MB, 0, version)
    assert system.memory(tmp_path) == (64 * MB, 1 * MB)
    group(tmp_path / top, str(32 * MB), 40 * MB, 0, version)
    assert system.memory(tmp_path) == (32 * MB, 0)


def test_a_container_is_shown_its_own_group_as_the_root(tmp_path: Path) -> None:
    said(tmp_path, "0::/docker/of/the/host")
    group(tmp_path / "sys/fs/cgroup", str(64 * MB), 50 * MB, 0, 2)
    assert system.memory(tmp_path) == (64 * MB, 14 * MB)


@pytest.mark.parametrize("most", [None, "max"])
def test_without_a_limit_it_is_the_machine_s(tmp_path: Path, most: str | None) -> None:
    if most is not None:
        said(tmp_path, "0::/")
        group(tmp_path / "sys/fs/cgroup", most, 50 * MB, 0, 2)
    found = system.memory(tmp_path)
    assert found.total == psutil.virtual_memory().total
    assert found.free > 64 * MB
