"""`limner train clip` with a teacher: what it says is looked up, learned, and asked for only once."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.nn.functional import normalize
from torch.testing import assert_close

from kills import kill, writes_of
from limner.artifacts import read_json
from limner.config import TrainClipConfig
from limner.data.dataset import read_split
from limner.errors import ConfigError, DataError, ModelError, RunError, UserError
from limner.evaluation.features import caption_features, picture_features
from limner.models import loading
from limner.stages import train_clip
from limner.stages.train_clip import NO_PAIR, TrainClip
from limner.training.losses import contrastive, missed
from trainings import config, weights

SAYINGS = ["A red circle on a blue ground.", "Something else.", "", "  A green square.  "]


@pytest.fixture(scope="module")
def sayings(stages: Path) -> Path:
    """A file of captions without pictures."""
    file = stages / "sayings.txt"
    file.write_text("\n".join(SAYINGS))
    return file


def settings(data: Path, out: Path, **values: Any) -> TrainClipConfig:
    """The smallest configuration."""
    return config(TrainClipConfig, data, out, **values)


def test_each_example_brings_what_the_teacher_says_of_it(
    teacher: Path, sayings: Path, data: Path, uncaptioned: Path, tmp_path: Path
) -> None:
    extra = {"extra": str(uncaptioned), "extra_captions": str(sayings)}
    made = TrainClip(settings(data, tmp_path / "r", teacher=str(teacher), **extra, min_scale=1))
    clip = loading.load_clip(str(teacher))
    own, others = read_split(data, "train"), read_split(uncaptioned, "train")
    further = [line.strip() for line in SAYINGS if line.strip()]
    captions = {caption for record in own for caption in record.captions}.union(further)
    said = {tuple(made.clip.tokenize([caption])[0].tolist()): caption for caption in captions}
    shown: Counter[Path] = Counter()
    for position in range(200):
        example = made.stream[position]
        caption = said[tuple(example["ids"].tolist())]
        assert_close(caption_features(clip, [caption], 8)[0], example["read"])
        if is_pair := example["owner"] != NO_PAIR:
            assert caption in own[example["owner"]].captions
        else:
            assert caption in further
        records = [own[example["owner"]]] if is_pair else others
        seen = picture_features(clip, [record.path for record in records], 8)
        nearest = (seen - example["seen"]).norm(dim=1).argmin()
        assert_close(seen[nearest], example["seen"])
        shown[records[nearest].path] += 1
    assert len(shown) == len(own) + len(others)
    assert 70 < sum(shown[record.path] for record in others) < 130


def test_joined_captions_are_taken_to_stand_between_them(teacher: Path, data: Path, tmp_path: Path) -> None:
    lessons = TrainClip(settings(data, tmp_path / "r", teacher=str(teacher))).lessons
    assert lessons is not None
    captions = read_split(data, "train")[3].captions
    wanted = caption_features(loading.load_clip(str(teacher)), [captions[4], captions[1]], 8).mean(dim=0)
    assert_close(lessons.of_pair(3, [4, 1])["read"], normalize(wanted, dim=0))


def test_where_only_one_kind_is_further_the_other_is_of_the_pairs(
    teacher: Path, sayings: Path, data: Path, uncaptioned: Path, tmp_path: Path
) -> None:
    own = {record.path for record in read_split(data, "train")}
    for extra, is_own in (({"extra": str(uncaptioned)}, False), ({"extra_captions": str(sayings)}, True)):
        lessons = TrainClip(settings(data, tmp_path / "r", teacher=str(teacher), **extra)).lessons
        assert lessons is not None
        drawn = [lessons.draw(np.random.default_rng(seed)) for seed in range(40)]
        assert {path in own for path, _, _ in drawn} == {is_own}
        assert {caption in {s.strip() for s in SAYINGS} for _, caption, _ in drawn} == {is_own}


def test_pairs_are_contrasted_and_all_rows_are_taught(
    clip: Path, teacher: Path, data: Path, uncaptioned: Path, tmp_path: Path
) -> None:
    how = {"model": str(clip), "teacher": str(teacher), "extra": str(uncaptioned), "teacher_weight": 3.0}
    made = TrainClip(settings(data, tmp_path / "r", **how))
    batch = next(made.stream.batches(0, 16, 16))
    loss, figures = made.loss(made.network, batch)
    text, images, _, scale, _ = made.network(batch["ids"], batch["pixels"])
    rows = batch["owner"] != NO_PAIR
    assert 0 < rows.sum() < 16
    assert_close(figures["aligned"], contrastive(text[rows], images[rows], scale, batch["owner"][rows]))
    assert_close(figures["missed"], missed(text, images, batch["read"], batch["seen"]))
    assert_close(loss, figures["aligned"] + 3 * figures["missed"])
    batch["owner"].fill_(NO_PAIR)
    assert_close(made.loss(made.network, batch)[0], 3 * figures["missed"])  # a batch without a pair


def test_it_learns_where_the_teacher_puts_pictures_and_captions(
    clip: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    how = {"model": str(clip), "images": 320, "batch_size": 16, "lr": 3e-3, "min_scale": 1, "result": "last"}
    rare = {"log_every": 160, "validate_every": 320, "checkpoint_every": 320}
    left = []
    for taught in ({}, {"teacher": str(teacher), "teacher_weight": 5.0}):
        run = train_clip.run(settings(data, tmp_path / str(len(taught)), **how, **rare, **taught))
        pupil, wanted = loading.load_clip(str(run)), loading.load_clip(str(teacher))
        val = read_split(data, "val")
        captions, paths = [record.captions[0] for record in val], [record.path for record in val]
        mine, its = ((caption_features(c, captions, 8), picture_features(c, paths, 8)) for c in (pupil, wanted))
        left.append(missed(*mine, *its).item())
    assert left[1] < 0.7 * left[0]
    assert "teacher" in read_json(tmp_path / "2" / "manifest.json")["parents"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL and forked workers")
def test_killed_and_resumed_it_ends_with_the_same_bits_and_asks_no_more(
    clip: Path, teacher: Path, data: Path, uncaptioned: Path, tmp_path: Path
) -> None:
    how = {"model": str(clip), "teacher": str(teacher), "extra": str(uncaptioned), "lr": 1e-2}
    whole, killed = (settings(data, tmp_path / name / "r", **how) for name in ("whole", "killed"))
    for made in (whole, killed):  # each with features of its own
        made.out.parent.mkdir()
    count = writes_of(train_clip.run, whole)
    kill(train_clip.run, killed, at_write=count // 2)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed" / "features").iterdir()}
    assert len(kept) == 3, "of the pairs' pictures, of the further ones and of captions"
    assert weights(train_clip.run(killed)) == weights(whole.out)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "killed" / "features").iterdir()} == kept
    other = killed.model_copy(update={"teacher": str(clip)})
    with pytest.raises(RunError, match="other contents of teacher"):
        train_clip.run(other)


def test_a_plan_asks_and_writes_nothing(teacher: Path, data: Path, tmp_path: Path) -> None:
    assert "steps" in train_clip.plan(settings(data, tmp_path / "r", teacher=str(teacher)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"teacher": "./nowhere"}, ModelError, "nowhere"),
        ({"extra": "DATA"}, ConfigError, "extra shows what has no pair"),
        ({"extra_captions": "nowhere.txt"}, ConfigError, "extra_captions shows what has no pair"),
        ({"teacher": "TEACHER", "extra": "nowhere"}, DataError, "nowhere is not a dataset folder"),
        ({"teacher": "TEACHER", "extra_captions": "nowhere.txt"}, DataError, r"nowhere\.txt can't be read"),
        ({"teacher": "TEACHER", "extra_captions": "EMPTY"}, DataError, r"empty\.txt has no captions; write one a line"),
    ],
)
def test_mistakes_are_said_in_a_sentence_and_nothing_is_written(
    how: dict[str, str], error: type[UserError], match: str, teacher: Path, data: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    places = {"DATA": str(data), "TEACHER": str(teacher), "EMPTY": str(empty)}
    for call in (train_clip.run, train_clip.plan):
        with pytest.raises(error, match=match) as caught:
            call(settings(data, tmp_path / "r", **{name: places.get(value, value) for name, value in how.items()}))
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [empty]
