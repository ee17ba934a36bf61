"""recipes/pseudo_captions.py: photographs find the captions that a teacher puts nearest to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limner.artifacts import read_json
from limner.data.dataset import read_split, split_identity
from limner.evaluation.features import caption_features, picture_features
from limner.models import loading
from trainings import script

SAYINGS = ["A red circle on a blue ground.", "Something else.", "", "  A green square.  "]


def test_photographs_find_the_captions_nearest_to_them(
    data: Path, uncaptioned: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sayings = tmp_path / "sayings.txt"
    sayings.write_text("\n".join(SAYINGS))
    given = ["--data", data, "--extra", uncaptioned, "--captions", sayings, "--teacher", teacher]
    script(monkeypatch, "pseudo_captions.py", *given, "--out", tmp_path / "out", "--share", "0.5", "--each", "2")

    own, bare = read_split(data, "train"), read_split(uncaptioned, "train")
    pool = sorted(
        {caption for record in own for caption in record.captions} | {line.strip() for line in SAYINGS if line}
    )
    clip = loading.load_clip(str(teacher))
    texts = caption_features(clip, pool, 8)
    wanted = []
    for record, picture in zip(bare, picture_features(clip, [record.path for record in bare], 8), strict=True):
        cosines = [torch.cosine_similarity(picture, text, dim=0).item() for text in texts]
        nearest = sorted(range(len(pool)), key=lambda number: -cosines[number])[:2]
        wanted.append((cosines[nearest[0]], record, tuple(pool[number] for number in nearest)))
    kept = sorted(wanted, key=lambda match: -match[0])[: round(len(bare) / 2)]

    found = read_split(tmp_path / "out", "train")
    assert [record.captions for record in found[: len(own)]] == [record.captions for record in own]
    assert {record.path: record.captions for record in found[len(own) :]} == {
        record.path.resolve(): captions for _, record, captions in kept
    }
    assert read_split(tmp_path / "out", "val") == [
        type(record)(record.path.resolve(), record.captions) for record in read_split(data, "val")
    ]
    facts = read_json(tmp_path / "out" / "dataset.json")
    assert facts["counts"]["train"] == len(found)
    assert facts["captions"]["train"] == sum(len(record.captions) for record in found)
    assert facts["pseudo_captions"]["of"] == split_identity(uncaptioned, "train")
    assert facts["pseudo_captions"]["least_cosine"] == pytest.approx(kept[-1][0], abs=1e-5)
