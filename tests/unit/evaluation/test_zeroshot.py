"""Zero-shot accuracy: what counts as a labelled folder, and accuracy against its definition."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.testing import assert_close

from limner.data.pictures import load_pixels
from limner.errors import DataError
from limner.evaluation.zeroshot import TEMPLATES, accuracy, class_features, read_labelled, zero_shot
from limner.models.clip import Clip
from photos import jpeg, put

# ---- the folder


def test_a_folder_a_class(tmp_path: Path) -> None:
    names = (
        *("hot_dog/b.PNG", "hot_dog/a.jpg", "cat/z.webp", "cat/y.Jpeg", "cat/notes.txt", "cat/._y.jpg"),
        *("cat/old/x.jpg", ".cache/a.jpg", "empty/readme.md", "at_the_top.jpg"),
    )
    put(tmp_path, dict.fromkeys(names, b""))
    classes, paths, labels = read_labelled(tmp_path)
    assert classes == ["cat", "hot dog"]
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == [
        *("cat/y.Jpeg", "cat/z.webp"),
        *("hot_dog/a.jpg", "hot_dog/b.PNG"),
    ]
    assert labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("names", "count"),
    [((), "no folders"), (("a.jpg", "b.jpg"), "no folders"), (("cat/a.jpg", "dog/a.txt"), "1 folder of pictures;")],
)
def test_less_than_two_classes_are_refused(tmp_path: Path, names: tuple[str, ...], count: str) -> None:
    put(tmp_path, dict.fromkeys(names, b""))
    with pytest.raises(DataError, match=f"has {count}"):
        read_labelled(tmp_path)


@pytest.mark.parametrize("name", ["missing", "file.zip"])
def test_what_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path, {"file.zip": b""})
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / name} has no folders of pictures")):
        read_labelled(tmp_path / name)


# ---- classes


@torch.no_grad()
def test_class_features_are_means_over_templates(clip: Clip) -> None:
    names = ["dog", "hot dog", "swimming pool"]
    features = class_features(clip, names)
    for name, found in zip(names, features, strict=True):
        alone = [clip.text_features(clip.tokenize([template.format(name)]))[0] for template in TEMPLATES]
        assert_close(found, normalize(torch.stack(alone).mean(dim=0), dim=0), rtol=0, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_templates_are_whole() -> None:
    assert len(set(TEMPLATES)) == len(TEMPLATES)
    assert "a photo of a {}." in TEMPLATES
    for template in TEMPLATES:
        assert template.count("{}") == 1
        assert template.startswith("a ")
        assert template.endswith(".")


# ---- accuracy


@given(st.integers(2, 8), st.data())
def test_accuracy_is_what_a_naive_loop_finds(classes: int, data: st.DataObject) -> None:
    row = st.lists(st.integers(-3, 3).map(lambda n: n / 4), min_size=classes, max_size=classes)
    table = data.draw(st.lists(row, min_size=1, max_size=8))
    labels = [data.draw(st.integers(0, classes - 1)) for _ in table]
    places = [sorted(range(classes), key=lambda c: (-row[c], c == own)).index(own) for row, own in zip(table, labels)]
    wanted = {f"zero_shot_top{k}": sum(p < k for p in places) / len(places) for k in (1, 5)}
    if classes <= 5:
        del wanted["zero_shot_top5"]
    # Classes along the axes, so that the features of a picture are its similarities.
    assert accuracy(torch.tensor(table), torch.eye(classes), torch.tensor(labels)) == pytest.approx(wanted)


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_collapsed_network_knows_nothing(value: float) -> None:
    figures = accuracy(torch.full((6, 4), value), torch.full((7, 4), value), torch.arange(6))
    assert figures == {"zero_shot_top1": 0.0, "zero_shot_top5": 0.0}


@torch.no_grad()
def test_pictures_in_the_folder_of_the_nearest_class_are_right(clip: Clip, tmp_path: Path) -> None:
    names = ["cat", "dog", "hot dog", "man", "pool", "street"]
    put(tmp_path / "all", {f"{n:02d}.jpg": jpeg(n) for n in range(24)})
    classes = class_features(clip, names)
    nearest = {}
    for path in sorted((tmp_path / "all").iterdir()):
        nearest[path] = int((clip.image_features(load_pixels(path, clip.size)[None]) @ classes.T).argmax())
    assert len(set(nearest.values())) > 1, "or else little would be compared"
    for number, (path, label) in enumerate(nearest.items()):
        wrong = number < 6  # which a wrong folder must show
        folder = tmp_path / "labelled" / names[(label + wrong) % len(names)].replace(" ", "_")
        put(folder, {path.name: path.read_bytes()})
    for name in names:  # each class has a picture, perhaps a wrong one
        put(tmp_path / "labelled" / name.replace(" ", "_"), {"extra.jpg": jpeg(0)})
    extra_right = 1  # the same picture in each folder is right in one
    figures = zero_shot(clip, tmp_path / "labelled", batch_size=7)
    assert figures["zero_shot_top1"] == pytest.approx((24 - 6 + extra_right) / (24 + 6))
    assert figures["zero_shot_top1"] < figures["zero_shot_top5"] <= 1
