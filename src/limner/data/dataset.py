"""The dataset folder as every later stage reads it.

D/dataset.json                       name, licence, counts, source sha256, how it was split
D/{train,val,test}/metadata.jsonl    one picture a line: {"file_name", "captions": [...], "text": the first}
D/{train,val,test}/*.jpg ...         the pictures
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from limner.errors import DataError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Record:
    """One picture and what people said of it."""

    path: Path
    captions: tuple[str, ...]


def read_split(folder: Path, split: Split) -> list[Record]:
    """The pictures of a split, in the order of its metadata.

    Raises DataError where `folder` is no dataset folder or a line of the metadata can't be read.
    """
    if not (folder / "dataset.json").is_file():
        raise DataError(f"{folder} is not a dataset folder; make one with `limner prepare`.")
    file = folder / split / "metadata.jsonl"
    if not file.exists():
        return []
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            records.append(Record(file.parent / row["file_name"], tuple(row["captions"])))
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{file}, line {number}, is damaged; run `limner prepare` again.") from None
    return records


def read_training_split(folder: Path, *, captioned: bool) -> list[Record]:
    """The train split, refused when it is empty or, if `captioned`, when no picture has a caption."""
    records = read_split(folder, "train")
    if captioned:
        records = [record for record in records if record.captions]
    if not records:
        what = "captioned pictures" if captioned else "pictures"
        raise DataError(f"{folder} has no {what} in its train split; prepare a source that has some.")
    return records


def read_validation_split(folder: Path) -> list[Record]:
    """The val split, refused when it is empty."""
    records = read_split(folder, "val")
    if not records:
        raise DataError(f"{folder} has no pictures in its val split; prepare it with --val-share above 0.")
    return records


def split_identity(folder: Path, split: Split) -> str:
    """One SHA-256 for a split: of `dataset.json`, which has its source's hash and settings, and its metadata."""
    digest = hashlib.sha256()
    for file in (folder / "dataset.json", folder / split / "metadata.jsonl"):
        digest.update(file.read_bytes())
    return digest.hexdigest()
