"""What a server that died left behind is cleared, and what is known stays."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy")
from limner.serving.changes import Changes
from limner.serving.keeper import Keeper, folder_of
from limner.serving.metrics import Metrics
from limner.serving.store import Store, new_id


def test_files_without_a_row_are_cleared(store: Store, tmp_path: Path) -> None:
    keeper, job = Keeper("w", tmp_path, store, Changes(), Metrics()), new_id()
    keeper.clear(job, [])  # there is no folder yet
    folder = folder_of(tmp_path, job)
    folder.mkdir(parents=True)
    for name in ("dog-1.png", "dog-2.png", ".half-written"):
        (folder / name).touch()
    keeper.clear(job, [(folder / "dog-1.png").relative_to(tmp_path).as_posix()])
    assert [file.name for file in folder.iterdir()] == ["dog-1.png"]
