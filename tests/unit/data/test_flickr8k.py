"""Flickr8k in the three layouts that people hold, packed or not, with its known quirks."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from limner.data.archives import read
from limner.data.flickr8k import read_flickr8k
from limner.data.sources import Source
from limner.errors import DataError
from photos import put

NAMES = [f"{n}.jpg" for n in range(6)]
PICTURES = {name: f"content of {name}".encode() for name in NAMES}
CAPTIONS = {name: (f"Dog {name} .", f"Another, of {name} .") for name in NAMES}
TOKENS = "".join(f"{n}#{k}\t{c}\n" for n, captions in CAPTIONS.items() for k, c in enumerate(captions)).encode()
LISTS = {
    "Flickr_8k.trainImages.txt": b"0.jpg\n1.jpg\n2.jpg\n3.jpg\n",
    "Flickr_8k.devImages.txt": b"4.jpg\n",
    "Flickr_8k.testImages.txt": b"5.jpg\n",
}
SPLITS = {**dict.fromkeys(NAMES[:4], "train"), "4.jpg": "val", "5.jpg": "test"}
CSV = ("image,caption\n" + "".join(f"{n},{c}\n" for n, cs in CAPTIONS.items() for c in cs)).encode()


def karpathy(splits: dict[str, str]) -> bytes:
    """`dataset_flickr8k.json` in short."""
    images = [
        {"filename": n, "split": splits[n], "sentences": [{"raw": c, "tokens": []} for c in CAPTIONS[n]]} for n in NAMES
    ]
    return json.dumps({"images": images, "dataset": "flickr8k"}).encode()


def under(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files in a folder."""
    return {f"{folder}/{name}": data for name, data in files.items()}


def packed(path: Path, files: dict[str, bytes]) -> Path:
    """A zip. -> `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def captions_of(source: Source) -> dict[str, tuple[str, ...]]:
    """Captions by name, as they stand in the source."""
    return {p.name: tuple(c.strip() for c in p.captions) for p in source.pictures}


def reasons(source: Source) -> list[tuple[str, str, str]]:
    """File, reason and detail of each finding."""
    return [(f.file, f.reason, f.detail) for f in source.findings]


def assert_whole(source: Source, splits: dict[str, str] | None) -> None:
    """All six pictures with their content, captions and splits, and nothing amiss."""
    assert captions_of(source) == CAPTIONS
    assert {p.name: read(p.entry) for p in source.pictures} == PICTURES
    assert {p.name: p.split for p in source.pictures} == (splits or dict.fromkeys(NAMES))
    assert (source.split_by is not None) == (splits is not None)
    assert source.findings == []
    assert "non-commercial" in source.licence


ILLINOIS_TEXT = {"Flickr8k.token.txt": TOKENS, **LISTS, "readme.txt": b"", "Flickr8k.lemma.token.txt": b"x"}


def test_the_illinois_zips(tmp_path: Path) -> None:
    folder = packed(tmp_path / "Flickr8k_text.zip", ILLINOIS_TEXT).parent
    packed(folder / "Flickr8k_Dataset.zip", {**under("Flicker8k_Dataset", PICTURES), "__MACOSX/._0.jpg": b"x"})
    source = read_flickr8k(folder)
    assert_whole(source, SPLITS)
    assert source.layout == "the University of Illinois release, zipped"
    assert source.split_by == "the official lists Flickr_8k.{train,dev,test}Images.txt"


@pytest.mark.parametrize("at", ["", "Flickr8k_text/"])
def test_the_illinois_folders(tmp_path: Path, at: str) -> None:
    put(tmp_path, under("Flicker8k_Dataset", PICTURES) | {at + name: data for name, data in ILLINOIS_TEXT.items()})
    source = read_flickr8k(tmp_path)
    assert_whole(source, SPLITS)
    assert source.layout == "the University of Illinois release, unpacked"


def test_illinois_with_only_the_pictures_unpacked(tmp_path: Path) -> None:
    put(tmp_path, under("Flicker8k_Dataset", PICTURES))
    packed(tmp_path / "Flickr8k_text.zip", ILLINOIS_TEXT)
    assert_whole(read_flickr8k(tmp_path), SPLITS)


def test_pictures_that_are_there_zipped_and_unpacked_count_once(tmp_path: Path) -> None:
    put(tmp_path, under("Flicker8k_Dataset", PICTURES) | ILLINOIS_TEXT)
    packed(tmp_path / "Flickr8k_Dataset.zip", under("Flicker8k_Dataset", PICTURES))
    packed(tmp_path / "Flickr8k_text.zip", {**ILLINOIS_TEXT, "Flickr8k.token.txt": b"0.jpg#0\tOld .\n"})
    assert_whole(read_flickr8k(tmp_path), SPLITS)  # what is unpacked may have been mended, and goes before


def test_kaggles_folder(tmp_path: Path) -> None:
    source = read_flickr8k(put(tmp_path, under("Images", PICTURES) | {"captions.txt": CSV}))
    assert_whole(source, None)
    assert source.layout == "Kaggle's layout (captions.txt), unpacked"


@pytest.mark.parametrize("give", ["the zip", "its folder"])
def test_kaggles_zip(tmp_path: Path, give: str) -> None:
    path = packed(tmp_path / "archive.zip", under("Images", PICTURES) | {"captions.txt": CSV})
    source = read_flickr8k(path if give == "the zip" else tmp_path)
    assert_whole(source, None)
    assert source.layout == "Kaggle's layout (captions.txt), zipped"


def test_official_lists_are_used_beside_kaggles_captions_too(tmp_path: Path) -> None:
    assert_whole(read_flickr8k(put(tmp_path, under("Images", PICTURES) | {"captions.txt": CSV} | LISTS)), SPLITS)


@pytest.mark.parametrize("zipped", [False, True])
def test_karpathys_json_beside_pictures(tmp_path: Path, zipped: bool) -> None:
    text = {"dataset_flickr8k.json": karpathy(SPLITS)}
    if zipped:
        packed(tmp_path / "caption_datasets.zip", {**text, "dataset_coco.json": b"{}", "dataset_flickr30k.json": b"{}"})
        packed(tmp_path / "images.zip", PICTURES)
    else:
        put(tmp_path, under("images", PICTURES) | text)
    source = read_flickr8k(tmp_path)
    assert_whole(source, SPLITS)
    assert source.layout.startswith("Karpathy's JSON beside pictures")
    assert source.split_by == "the splits in dataset_flickr8k.json"


def test_karpathys_restval_is_train(tmp_path: Path) -> None:
    text = {"dataset_flickr8k.json": karpathy({**SPLITS, "0.jpg": "restval"})}
    assert_whole(read_flickr8k(put(tmp_path, PICTURES | text)), SPLITS)


# ---- quirks and faults


def test_pictures_outside_the_lists_and_phantoms_are_named(tmp_path: Path) -> None:
    more = b"6.jpg#0\tA\n6.jpg#1\tA dog .\n0.jpg.1#0\tNo such picture .\n0.jpg.1#1\tNor this .\n"
    put(tmp_path, PICTURES | {"6.jpg": b"x", "7.jpg": b"x"} | LISTS | {"Flickr8k.token.txt": TOKENS + more})
    source = read_flickr8k(tmp_path)
    assert captions_of(source) == CAPTIONS
    assert reasons(source) == [
        ("6.jpg", "in none of the split lists", "a caption says nothing: A"),
        ("7.jpg", "in none of the split lists", ""),
        ("0.jpg.1", "caption without picture", "2 captions"),
    ]
    assert not any(finding.kept for finding in source.findings)


def test_a_listed_picture_that_is_not_there_is_named(tmp_path: Path) -> None:
    pictures = {name: data for name, data in PICTURES.items() if name != "5.jpg"}
    source = read_flickr8k(put(tmp_path, pictures | {"Flickr8k.token.txt": TOKENS} | LISTS))
    assert reasons(source) == [("5.jpg", "missing picture", "named by the test list; 2 captions")]


def test_a_picture_in_two_lists_stays_in_the_first(tmp_path: Path) -> None:
    lists = {**LISTS, "Flickr_8k.testImages.txt": b"5.jpg\n0.jpg\n"}
    source = read_flickr8k(put(tmp_path, PICTURES | {"Flickr8k.token.txt": TOKENS} | lists))
    assert {p.name: p.split for p in source.pictures} == SPLITS
    ((file, reason, _),) = reasons(source)
    assert (file, reason) == ("0.jpg", "in two split lists")


def test_lines_that_can_not_be_understood_are_named(tmp_path: Path) -> None:
    tokens = b"no tab here\n\n" + TOKENS + b"0.jpg#2\tCaf\xe9 .\n\tno name\n"
    source = read_flickr8k(put(tmp_path, PICTURES | {"Flickr8k.token.txt": tokens} | LISTS))
    assert captions_of(source)["0.jpg"] == (*CAPTIONS["0.jpg"], "Café .")
    assert [(file, reason) for file, reason, _ in reasons(source)] == [
        ("Flickr8k.token.txt", "line can't be understood"),
        ("0.jpg", "caption is not UTF-8"),
        ("Flickr8k.token.txt", "line can't be understood"),
    ]


def test_other_files_and_second_copies_are_named(tmp_path: Path) -> None:
    put(tmp_path, under("Images", PICTURES) | {"captions.txt": CSV, "notes.doc": b"x", "old/0.jpg": b"x"})
    source = read_flickr8k(tmp_path)
    assert captions_of(source) == CAPTIONS
    assert reasons(source) == [
        ("notes.doc", "not a picture", "its name is not that of a picture"),
        ("old/0.jpg", "name appears twice", "Images/0.jpg is used"),
    ]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (PICTURES, "none of Flickr8k's layouts, as it holds neither"),
        ({}, "none of Flickr8k's layouts"),
        ({"captions.txt": CSV}, "captions but no pictures"),
        (PICTURES | {"captions.txt": b"nonsense"}, "has no header"),
        (PICTURES | {"dataset_flickr8k.json": b'{"images": [{"filename": 3}]}'}, "is not Karpathy's JSON"),
        (PICTURES | {"dataset_flickr8k.json": karpathy(SPLITS)[:-9]}, "is not Karpathy's JSON"),
        (PICTURES | {"Flickr8k.token.txt": TOKENS} | dict(list(LISTS.items())[:2]), "testImages.txt is missing"),
    ],
    ids=range(7),
)
def test_a_source_of_another_kind_is_refused_in_one_sentence(
    tmp_path: Path, files: dict[str, bytes], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        read_flickr8k(put(tmp_path, files))
    assert "\n" not in str(caught.value)
