"""What `limner evaluate` compares: short names that tell apart, and keys that pair pictures of the same prompt."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from limner.data.dataset import Record
from limner.errors import ConfigError, DataError
from limner.evaluation.contenders import Contender, from_folder, labels, photographs


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


def pictures_in(folder: Path) -> list[str]:
    """Five pictures, whose names are as macOS writes them."""
    names = [unicodedata.normalize("NFD", f"né{number}.png") for number in range(5)]
    for number, name in enumerate(names):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(folder / name)
    return names


def test_names_in_any_form_of_unicode_are_read_and_what_can_t_be_is_named(tmp_path: Path) -> None:
    for number, name in enumerate(pictures_in(tmp_path)):
        (tmp_path / name).with_suffix(".txt").write_text(f"dog {number}")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = from_folder(tmp_path, "drawn", [])
    assert sorted(record.captions for record in found.records) == [(f"dog {number}",) for number in range(5)]
    assert [finding.file for finding in found.skipped] == ["gone.png"]
    assert found.remarks == ["1 picture can't be read and is left out: gone.png."]


def test_photographs_that_are_not_asked_for_are_passed_over(tmp_path: Path) -> None:
    names = pictures_in(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "more.png")
    known = [Record(Path(unicodedata.normalize("NFC", name)), ("a cat",)) for name in ["more.png", *names]]
    found = from_folder(tmp_path, "drawn", known[1:], {"more"})
    assert {record.path.name for record in found.records} == set(names)
    with pytest.raises(DataError, match=r"of which 1 have no caption \(more\.png\)"):
        from_folder(tmp_path, "drawn", known[1:])


def test_a_caption_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    """Or else its picture would be scored against the photograph's."""
    names = pictures_in(tmp_path)
    lines = [json.dumps({"file_name": name, "text": "a dog"}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines)[:-5])
    with pytest.raises(DataError, match=r"metadata\.jsonl in .* can't be understood \(line 5: .*\); mend it"):
        from_folder(tmp_path, "drawn", [Record(Path(name), ("a cat",)) for name in names])
