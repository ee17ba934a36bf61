"""What `limner evaluate` compares: short names that tell apart, and keys that pair pictures of the same prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from limner.data.dataset import Record
from limner.errors import ConfigError
from limner.evaluation.contenders import Contender, labels, photographs


def test_names_are_as_short_as_they_can_be() -> None:
    assert labels(["builtin", "owner/name"]) == ["builtin", "name"]
    assert labels(["runs/a/model", "runs/b/model"]) == ["a/model", "b/model"]
    assert labels(["one"]) == ["one"]


def test_a_folder_of_photographs_is_told_from_the_real_ones() -> None:
    assert labels(["drawn/photographs", "drawn/one"]) == ["drawn/photographs", "drawn/one"]
    assert labels(["drawn/photographs"]) == ["drawn/photographs"]


def test_the_same_folder_by_another_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is given twice"):
        labels([str(tmp_path), str(tmp_path / "." / ".." / tmp_path.name)])


def test_pictures_of_one_caption_are_told_apart_by_their_order() -> None:
    records = [Record(Path(f"{number}.png"), (caption,)) for number, caption in enumerate(["a", "b", "a"])]
    assert Contender("c", records, {}).keys == [("a", 0), ("b", 0), ("a", 1)]


def test_photographs_without_a_caption_are_passed_over() -> None:
    records = [Record(Path("1"), ()), Record(Path("2"), ("a", "b")), Record(Path("3"), ("c",))]
    assert photographs(records, 1) == [Record(Path("2"), ("a",))]
    assert photographs(records, None) == [Record(Path("2"), ("a",)), Record(Path("3"), ("c",))]
