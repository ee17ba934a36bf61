"""recipes/teachers.py: what is stored of photographs and captions, by teachers of three colours and of lengths."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import avg_pool2d

import teachers
from limner.artifacts import read_json, sha256
from limner.data.dataset import read_split, split_identity

WORDS = ["A red circle.", "Something else."]


class Colours:
    """Sees the mean colour by place, and takes a picture for any class alike."""

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (N, 3, H, W) in [0, 1] -> features (N, H / 32, W / 32, 3), probabilities (N, 1000)."""
        return avg_pool2d(pixels, 32).permute(0, 2, 3, 1), torch.full((len(pixels), 1000), 1e-3)


class Lengths:
    """Reads how long a caption is."""

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (M, 384)."""
        return torch.tensor([[float(len(caption))] * 384 for caption in captions])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, uncaptioned: Path, tmp_path: Path) -> Any:
    """Stores what is known of a dataset into a folder."""
    monkeypatch.setattr(teachers, "ImageTeacher", Colours)
    monkeypatch.setattr(teachers, "Sentences", Lengths)
    monkeypatch.setattr(teachers, "class_names", lambda: ["thing"] * 1000)
    monkeypatch.setattr(teachers, "COMPONENTS", 2)
    (tmp_path / "words.txt").write_text("\n".join(WORDS))

    def store(data: Path, out: Path) -> None:
        given = ["--data", data, "--extra", uncaptioned, "--captions", tmp_path / "words.txt", "--out", out]
        monkeypatch.setattr("sys.argv", ["teachers.py", *map(str, given)])
        teachers.main()

    return store


def test_what_is_there_is_kept_until_it_is_to_be_of_other_contents(store: Any, data: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "out", tmp_path / "words.txt"
    store(data, out)
    facts, written = read_json(out / "counts.json"), (out / "maps.npy").stat().st_mtime_ns
    assert facts["made_of"]["data/val"] == split_identity(data, "val")
    assert facts["made_of"]["captions"] == sha256(words)
    store(data, out)
    assert (out / "maps.npy").stat().st_mtime_ns == written
    words.write_text("\n".join(reversed(WORDS)))
    store(data, out)
    assert read_json(out / "captions.json")[-2:] == WORDS[::-1]
    assert read_json(out / "counts.json") == {**facts, "made_of": {**facts["made_of"], "captions": sha256(words)}}


def test_pictures_of_val_change_nothing_for_those_that_are_learned_from(store: Any, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for record in read_split(other, "val"):
        with Image.open(record.path) as picture:
            ImageOps.invert(picture.convert("RGB")).save(record.path)
    maps = []
    for folder in (data, other):
        store(folder, tmp_path / "out" / folder.name)
        maps.append(np.load(tmp_path / "out" / folder.name / "maps.npy"))
    counts = read_json(tmp_path / "out" / "other" / "counts.json")
    learned = counts["train"] + counts["extra"]
    np.testing.assert_array_equal(maps[0][:learned], maps[1][:learned])
    assert (maps[0][learned:] != maps[1][learned:]).any(axis=(1, 2, 3)).all()
