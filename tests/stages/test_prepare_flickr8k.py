"""The real Flickr8k, which is not part of the repository: half a minute on two cores, skipped where it is missing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from commands import limner

FLICKR8K = Path(__file__).parents[3] / "shared" / "data" / "flickr8k"
COUNTS = {"train": 6_000, "val": 1_000, "test": 1_000}

pytestmark = pytest.mark.skipif(
    not (FLICKR8K / "Flickr8k_Dataset.zip").exists(), reason=f"needs the zips of Flickr8k in {FLICKR8K}"
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset folder that `limner prepare` makes."""
    folder = tmp_path_factory.mktemp("flickr8k") / "data"
    assert limner("prepare", "flickr8k", "--source", FLICKR8K, "--out", folder) == 0
    return folder


def lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_picture_and_caption_is_accounted_for(out: Path) -> None:
    facts = json.loads((out / "dataset.json").read_text())
    assert facts["counts"] == COUNTS
    assert facts["captions"] == {split: 5 * count for split, count in COUNTS.items()}
    assert facts["splits"] == {"by": "the official lists Flickr_8k.{train,dev,test}Images.txt", "from_source": True}
    for split, count in COUNTS.items():
        rows = lines(out / split / "metadata.jsonl")
        assert {len(row["captions"]) for row in rows} == {5}
        assert {row["file_name"] for row in rows} == {path.name for path in (out / split).glob("*.jpg")}
        assert len(rows) == count
    findings = lines(out / "quarantine.jsonl")
    lost = Counter(row["reason"] for row in findings if not row["kept"])
    assert lost == {"in none of the split lists": 91, "caption without picture": 1} == facts["quarantined"]
    assert sum(COUNTS.values()) + 91 == 8_091, "all photographs of Flickr8k"


def test_its_known_quirks_are_reported(out: Path) -> None:
    findings = {row["file"]: row for row in lines(out / "quarantine.jsonl")}
    phantom = findings["2258277193_586949ec62.jpg.1"]
    assert (phantom["reason"], phantom["detail"]) == ("caption without picture", "5 captions")
    assert findings["2428275562_4bde2bc5ea.jpg"]["detail"] == "a caption says nothing: A"
    assert findings["2755314937_1e974bf2b5.jpg"]["detail"] == "a caption says nothing: broken image"


def test_captions_are_clean(out: Path) -> None:
    captions = [c for split in COUNTS for row in lines(out / split / "metadata.jsonl") for c in row["captions"]]
    assert not [caption for caption in captions if " ." in caption or caption != " ".join(caption.split())]
    assert "A black dog and a spotted dog are fighting" in captions


def test_datasets_reads_all_three_splits(out: Path, tmp_path: Path) -> None:
    dataset = load_dataset("imagefolder", data_dir=str(out), cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in dataset.items()} == {
        "train": 6_000,
        "validation": 1_000,
        "test": 1_000,
    }
    row = dataset["train"][0]
    assert row["image"].size == (224, 224)
    assert row["text"] == row["captions"][0]
