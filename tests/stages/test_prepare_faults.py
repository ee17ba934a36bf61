"""Twenty planted faults, in both kinds of source: each is mended or named, and nothing is written elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commands import limner
from faults import RAMP, SIZE, UNICODE, faults, illinois_zip, metadata_zip
from photos import photo, pixels_of

CLOSE = 4  # mean difference of 255 steps that one pass through JPEG may make, in places where CMYK is on the way


@dataclass(frozen=True)
class Prepared:
    """The dataset made of the faulty zip."""

    out: Path
    kind: str
    rows: dict[str, list[str]]
    """Captions by file name, of all splits."""
    found: dict[str, list[dict[str, Any]]]
    """Lines of quarantine.jsonl by the base name of the file."""

    def picture(self, name: str) -> np.ndarray[Any, np.dtype[np.int16]]:
        """The pixels of a picture of the dataset."""
        (path,) = self.out.glob(f"*/{name}")
        return pixels_of(path)

    def reasons(self, name: str) -> list[str]:
        """Why a file, or a caption of it, is not in the dataset."""
        return [row["reason"] for row in self.found.get(name, []) if not row["kept"]]

    def remarks(self, name: str) -> list[str]:
        """What was remarked of a file that is in the dataset."""
        return [row["reason"] for row in self.found.get(name, []) if row["kept"]]


@pytest.fixture(scope="module", params=["flickr8k", "imagefolder"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """What `limner prepare` made of the zip; that it ended well and wrote nowhere else is asserted here."""
    root = tmp_path_factory.mktemp("faults")
    make: Callable[[Path, Path], Path] = illinois_zip if request.param == "flickr8k" else metadata_zip
    source = make(root / "source.zip", root / "elsewhere")
    out = root / "prepared" / "data"
    assert limner("prepare", request.param, "--source", source, "--out", out) == 0
    written = {path for path in root.rglob("*") if path.is_file() and not path.is_relative_to(out)}
    assert written == {source}
    rows = {
        row["file_name"]: row["captions"]
        for file in out.glob("*/metadata.jsonl")
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (out / "quarantine.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["file"].rsplit("/")[-1], []).append(row)
    return Prepared(out, request.param, rows, found)


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Mean absolute difference of two pictures of the same size."""
    assert one.shape == other.shape
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


REJECTED = {
    "truncated JPEG": "broken picture",
    "text named .jpg": "not a picture",
    "zero bytes": "empty file",
    "1x1": "too small",
    "header bomb": "too many pixels",
    "../escape.jpg": "path leads out of the source",
    "absolute path": "path leads out of the source",
    "missing file": "missing picture",
    "caption without image": "caption without picture",
    "image without caption": "picture without caption",
}
"""What can't be used, and the one reason given for it."""


def test_all_twenty_faults_are_mended_or_named(prepared: Prepared) -> None:
    planted = faults(Path("/elsewhere"))
    assert len(planted) == 20
    told: set[str] = set()

    for fault, reason in REJECTED.items():
        name = planted[fault].name.rsplit("/")[-1]
        file = "caption_only.txt" if name == "caption_only.jpg" and prepared.kind == "imagefolder" else name
        assert prepared.reasons(file) == [reason], fault
        assert not [row for row in prepared.rows if row.startswith(name.split(".")[0])], fault
        told.add(fault)

    # Pixels that are brought to upright 8-bit RGB.
    assert difference(prepared.picture("cmyk.jpg"), np.asarray(photo(2, *SIZE))) < CLOSE
    told.add("CMYK")
    assert difference(prepared.picture("deep.jpg")[..., 0], RAMP / 257) < 1
    told.add("16-bit PNG")
    rgba = prepared.picture("rgba.jpg")
    assert difference(rgba[:, :28], np.asarray(photo(3, *SIZE))[:, :28]) < CLOSE
    assert difference(rgba[:, 36:], np.full((48, 28, 3), 255)) < 1, "what can't be seen is white"
    told.add("RGBA")
    assert difference(prepared.picture("rotated.jpg"), np.asarray(photo(4, *SIZE))) < CLOSE
    with Image.open(next(prepared.out.glob("*/rotated.jpg"))) as image:
        assert not image.getexif(), "nobody may turn it once more"
    told.add("EXIF-rotated")

    # Files that are right but for their name.
    planted_png = planted["wrong extension"].data
    assert next(prepared.out.glob("*/wrong_extension.*")).name == "wrong_extension.png"
    assert next(prepared.out.glob("*/wrong_extension.png")).read_bytes() == planted_png, "its bytes are kept"
    told.add("wrong extension")
    assert UNICODE in prepared.rows
    assert next(prepared.out.glob(f"*/{UNICODE}")).read_bytes() == planted["unicode name"].data
    told.add("unicode name")

    # Pictures and captions that are kept, with a remark.
    assert "z_duplicate.jpg" in prepared.rows
    assert prepared.remarks("z_duplicate.jpg") == ["same picture as another"]
    told.add("duplicate")
    assert prepared.rows["empty_caption.jpg"] == ["A dog sleeps."]
    assert prepared.reasons("empty_caption.jpg") == ["empty caption"]
    told.add("empty caption")
    assert prepared.rows["latin.jpg"] == ["A café terrace."]
    assert prepared.remarks("latin.jpg") == ["caption is not UTF-8"]
    told.add("non-UTF-8 caption")
    assert len(prepared.rows["long.jpg"][0].split()) == 298
    assert prepared.remarks("long.jpg") == ["caption over 77 CLIP tokens"]
    assert "300" in prepared.found["long.jpg"][0]["detail"]
    told.add("300-token caption")

    assert told == set(planted)


def test_sound_pictures_beside_them_are_kept_and_no_other(prepared: Prepared) -> None:
    sound = {name: captions for name, captions in prepared.rows.items() if name.startswith("sound")}
    assert len(sound) == 12
    assert set(map(tuple, sound.values())) == {("A dog runs.", "Two dogs run.")}
    mended = {"cmyk.jpg", "deep.jpg", "rgba.jpg", "rotated.jpg", "wrong_extension.png", UNICODE}
    remarked = {"z_duplicate.jpg", "empty_caption.jpg", "latin.jpg", "long.jpg"}
    assert set(prepared.rows) - set(sound) == mended | remarked
    assert {p.name for p in prepared.out.glob("*/*")} == {*prepared.rows, "metadata.jsonl"}


def test_faults_are_counted(prepared: Prepared) -> None:
    facts = json.loads((prepared.out / "dataset.json").read_text())
    lines = [row for rows in prepared.found.values() for row in rows]
    for key, kept in (("quarantined", False), ("remarks", True)):
        reasons = [row["reason"] for row in lines if row["kept"] == kept]
        assert facts[key] == {reason: reasons.count(reason) for reason in reasons}
    assert sum(facts["quarantined"].values()) == 11
    assert sum(facts["counts"].values()) == len(prepared.rows) == 22


def test_the_report_names_every_fault(prepared: Prepared) -> None:
    html = (prepared.out / "report.html").read_text(encoding="utf-8")
    for name in prepared.found:
        assert name in html
    assert "named .png instead of .jpg (1)" in html
    assert "turned upright (1)" in html
    assert not re.search(r'(src|href)="(?!data:image/)', html), "it opens offline"
    if prepared.kind == "flickr8k":  # there the duplicate lies in another split
        assert re.search(r"train/sound_0\.jpg<br>test/z_duplicate\.jpg<br>0 bits apart", html)
