"""A dataset folder is read back as it was written, and one that is none is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from limner.data.dataset import Record, read_split, read_training_split
from limner.data.findings import json_line
from limner.errors import DataError
from photos import put

ROWS = [
    {"file_name": "犬.jpg", "captions": ["A dog.", "Two\u2028lines"], "text": "A dog."},
    {"file_name": "b.png", "captions": [], "text": ""},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset folder with a train split of two."""
    lines = "".join(map(json_line, ROWS)).encode()
    return put(tmp_path / "data", {"dataset.json": b"{}", "train/metadata.jsonl": lines})


def test_a_split_comes_back_in_its_order(folder: Path) -> None:
    assert read_split(folder, "train") == [
        Record(folder / "train" / "犬.jpg", ("A dog.", "Two\u2028lines")),
        Record(folder / "train" / "b.png", ()),
    ]
    assert read_split(folder, "val") == []


def test_training_on_captions_takes_the_pictures_that_have_some(folder: Path) -> None:
    assert len(read_training_split(folder, captioned=False)) == 2
    assert [record.path.name for record in read_training_split(folder, captioned=True)] == ["犬.jpg"]


def test_a_train_split_without_what_is_needed_is_refused(folder: Path) -> None:
    put(folder, {"train/metadata.jsonl": json_line(ROWS[1]).encode()})
    with pytest.raises(DataError, match="no captioned pictures in its train split"):
        read_training_split(folder, captioned=True)
    put(folder, {"train/metadata.jsonl": b""})
    with pytest.raises(DataError, match="no pictures in its train split"):
        read_training_split(folder, captioned=False)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="is not a dataset folder; make one"):
            read_split(path, "train")


@pytest.mark.parametrize("line", ['{"file_name": "a.jpg"', '{"captions": []}', "[]", '{"file_name": "a"}'])
def test_a_damaged_line_is_named(folder: Path, line: str) -> None:
    put(folder, {"train/metadata.jsonl": (json_line(ROWS[0]) + line).encode()})
    with pytest.raises(DataError, match="line 2, is damaged"):
        read_split(folder, "train")
