"""Pictures with metadata or .txt files beside them, and WebDataset shards, also those that its own writer makes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from limner.data.archives import read
from limner.data.folders import read_imagefolder, read_webdataset
from limner.data.sources import Source
from limner.errors import DataError
from photos import jpeg, put


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    """Captions by name, as they stand in the source."""
    return {p.name: tuple(c.strip() for c in p.captions) for p in source.pictures}


def splits(source: Source) -> dict[str, str | None]:
    """Splits by name."""
    return {p.name: p.split for p in source.pictures}


def reasons(source: Source) -> list[tuple[str, str]]:
    """File and reason of each finding."""
    return [(f.file, f.reason) for f in source.findings]


def jsonl(*rows: object) -> bytes:
    """The rows as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# ---- imagefolder


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "A dog."}, ("A dog.",)),
        ({"caption": "A dog."}, ("A dog.",)),
        ({"captions": ["A dog.", "A cat."], "text": "A dog."}, ("A dog.", "A cat.")),
        ({"text": ["A dog.", "A cat."]}, ("A dog.", "A cat.")),
        ({"captions": None, "text": "A dog."}, ("A dog.",)),
        ({"captions": []}, ()),
        ({"captions": ["A dog.", 7, None]}, ("A dog.",)),
        ({"other": "A dog."}, ()),
    ],
    ids=range(8),
)
def test_metadata_jsonl(tmp_path: Path, row: dict[str, object], expected: tuple[str, ...]) -> None:
    put(tmp_path, {"a.jpg": b"x", "metadata.jsonl": jsonl({"file_name": "a.jpg", **row})})
    source = read_imagefolder(tmp_path)
    assert captions(source) == {"a.jpg": expected}
    assert source.layout == "pictures with metadata"
    assert source.findings == []


def test_metadata_csv_with_several_rows_a_picture(tmp_path: Path) -> None:
    put(
        tmp_path, {"a.jpg": b"x", "b.png": b"x", "metadata.csv": b"file_name,text\na.jpg,One\nb.png,Two\na.jpg,Three\n"}
    )
    assert captions(read_imagefolder(tmp_path)) == {"a.jpg": ("One", "Three"), "b.png": ("Two",)}


def test_metadata_names_files_from_where_it_lies(tmp_path: Path) -> None:
    put(tmp_path, {"x/a.jpg": b"x", "x/y/b.jpg": b"x", "a.jpg": b"x"})
    put(
        tmp_path,
        {"x/metadata.jsonl": jsonl({"file_name": "a.jpg", "text": "A"}, {"file_name": "y/b.jpg", "text": "B"})},
    )
    assert captions(read_imagefolder(tmp_path)) == {"a.jpg": (), "x/a.jpg": ("A",), "x/y/b.jpg": ("B",)}


def test_txt_files_beside_pictures_hold_a_caption_a_line(tmp_path: Path) -> None:
    files = {"a.jpg": b"x", "a.txt": b"One\n\nTwo\n", "b.JPG": b"x", "b.txt": b"Caf\xe9", "c.jpg": b"x", "c.txt": b""}
    source = read_imagefolder(put(tmp_path, files | {"alone.txt": b"No picture", "notes.md": b""}))
    assert captions(source) == {"a.jpg": ("One", "Two"), "b.JPG": ("Café",), "c.jpg": ("",)}
    assert source.layout == "pictures with captions in .txt files"
    assert sorted(reasons(source)) == [
        ("alone.txt", "caption without picture"),
        ("b.JPG", "caption is not UTF-8"),
        ("notes.md", "not a picture"),
    ]


def test_metadata_goes_before_a_txt_file(tmp_path: Path) -> None:
    put(tmp_path, {"a.jpg": b"x", "a.txt": b"Old", "metadata.jsonl": jsonl({"file_name": "a.jpg", "text": "New"})})
    assert captions(read_imagefolder(tmp_path)) == {"a.jpg": ("New",)}


def test_faults_of_metadata_are_named_once_a_picture(tmp_path: Path) -> None:
    rows = [{"file_name": name, "text": "A dog."} for name in ("a.jpg", "b.jpg", "b.jpg", "../c.jpg", "../c.jpg")]
    put(tmp_path, {"a.jpg": b"x", "metadata.jsonl": jsonl(*rows, {"text": "nameless"}, "text", []) + b"{broken\n\n"})
    source = read_imagefolder(tmp_path)
    assert captions(source) == {"a.jpg": ("A dog.",)}
    assert sorted(reasons(source)) == [
        ("../c.jpg", "path leads out of the source"),
        ("b.jpg", "missing picture"),
        *[("metadata.jsonl", "line can't be understood")] * 4,
    ]


def test_splits_are_the_folders_names_where_all_pictures_lie_in_such(tmp_path: Path) -> None:
    put(tmp_path, {"train/a.jpg": b"x", "validation/b.jpg": b"x", "Test/deep/c.jpg": b"x"})
    source = read_imagefolder(tmp_path)
    assert splits(source) == {"train/a.jpg": "train", "validation/b.jpg": "val", "Test/deep/c.jpg": "test"}
    assert source.split_by == "the source's train, val and test folders"
    put(tmp_path, {"more/d.jpg": b"x"})
    source = read_imagefolder(tmp_path)
    assert set(splits(source).values()) == {None}
    assert source.split_by is None


def test_a_picture_without_caption_beside_the_splits_changes_none(tmp_path: Path) -> None:
    files = {f"{split}/a.jpg": jpeg(n) for n, split in enumerate(("train", "val", "test"))}
    texts = {f"{split}/a.txt": b"A dog." for split in ("train", "val", "test")}
    source = read_imagefolder(put(tmp_path / "source", {**files, **texts, "cover.jpg": jpeg(9)}))
    assert splits(source) == {"train/a.jpg": "train", "val/a.jpg": "val", "test/a.jpg": "test", "cover.jpg": None}
    assert source.split_by == "the source's train, val and test folders"
    put(tmp_path / "source", {"cover.txt": b"A cat."})
    assert read_imagefolder(tmp_path / "source").split_by is None


def test_a_csv_beside_metadata_jsonl_adds_nothing(tmp_path: Path) -> None:
    rows = {
        "metadata.jsonl": jsonl({"file_name": "a.jpg", "text": "A dog."}),
        "metadata.csv": b"file_name,text\na.jpg,A dog.\n",
    }
    source = read_imagefolder(put(tmp_path / "source", {"a.jpg": jpeg(), **rows}))
    assert captions(source) == {"a.jpg": ("A dog.",)}
    assert reasons(source) == [("metadata.csv", "captions stand in another file too")]


def test_a_folder_named_test_alone_is_no_split(tmp_path: Path) -> None:
    assert read_imagefolder(put(tmp_path, {"test/a.jpg": b"x", "val/b.jpg": b"x"})).split_by is None


@pytest.mark.parametrize("files", [{}, {"notes.md": b"", "a.txt": b"A dog."}])
def test_a_folder_without_pictures_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(DataError, match="holds no pictures; give the folder"):
        read_imagefolder(put(tmp_path, files))


# ---- WebDataset


def shard(path: Path, members: dict[str, bytes]) -> Path:
    """A tar shard. -> `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_shards_of_webdatasets_own_writer(tmp_path: Path) -> None:
    with webdataset.ShardWriter(f"{tmp_path}/set-%03d.tar", maxcount=2, verbose=0) as writer:
        for n in range(3):
            writer.write({"__key__": f"{n}", "jpg": jpeg(n), "txt": f"Dog {n}.", "cls": n})
    source = read_webdataset(tmp_path)
    assert captions(source) == {f"set-00{n // 2}.tar/{n}.jpg": (f"Dog {n}.",) for n in range(3)}
    assert [read(p.entry) for p in source.pictures] == [jpeg(n) for n in range(3)]
    assert source.layout == "2 WebDataset shards"
    assert source.findings == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"k.txt": b"One\nTwo\n"}, ("One", "Two")),
        ({"k.json": b'{"captions": ["One", "Two"]}'}, ("One", "Two")),
        ({"k.json": b'{"caption": "One"}', "k.txt": b"Short"}, ("One",)),
        ({"k.json": b'{"width": 3}', "k.txt": b"One"}, ("One",)),
        ({}, ()),
    ],
    ids=range(5),
)
def test_captions_of_a_sample(tmp_path: Path, files: dict[str, bytes], expected: tuple[str, ...]) -> None:
    source = read_webdataset(shard(tmp_path / "a.tar", {"k.jpg": b"x", **files}))
    assert captions(source) == {"a.tar/k.jpg": expected}


def test_keys_may_have_folders_and_extensions_dots(tmp_path: Path) -> None:
    members = {"x/1.seg.png": b"s", "x/1.jpg": b"x", "x/1.txt": b"One", "y/1.jpg": b"x", "y/1.txt": b"Two"}
    source = read_webdataset(shard(tmp_path / "a.tar", members))
    assert captions(source) == {"a.tar/x/1.jpg": ("One",), "a.tar/y/1.jpg": ("Two",)}
    assert reasons(source) == [("a.tar/x/1.seg.png", "name appears twice")]


def test_faults_of_shards_are_named(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"1.jpg": b"x", "1.json": b"{broken", "2.txt": b"alone", "../3.jpg": b"x"})
    whole = shard(tmp_path / "b.tar", {"4.jpg": b"x" * 600, "5.jpg": b"x" * 600}).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:2300])  # amid the content of 5.jpg
    source = read_webdataset(tmp_path)
    assert captions(source) == {"a.tar/1.jpg": (), "b.tar/4.jpg": (), "b.tar/5.jpg": ()}
    assert sorted(reasons(source)) == [
        ("a.tar/../3.jpg", "path leads out of the source"),
        ("a.tar/1.json", "line can't be understood"),
        ("a.tar/2.txt", "caption without picture"),
        ("b.tar/b.tar", "archive ends early"),
    ]


def test_splits_are_the_shards_names(tmp_path: Path) -> None:
    for name in ("train-000", "train-001", "val-000", "test_0"):
        shard(tmp_path / f"{name}.tar", {f"{name}.jpg": b"x"})
    assert list(splits(read_webdataset(tmp_path)).values()) == ["test", "train", "train", "val"]


def test_sources_that_are_no_shards_are_refused(tmp_path: Path) -> None:
    put(tmp_path, {"folder/a.jpg": b"x", "zip.zip": b"PK", "text.tar": b"hello" * 200})
    for name, sentence in {
        "missing.tar": "does not exist",
        "folder": "holds no .tar shards; is it a source for `limner prepare imagefolder`",
        "zip.zip": "no uncompressed tar",
        "text.tar": "no uncompressed tar",
    }.items():
        with pytest.raises(DataError, match=sentence):
            read_webdataset(tmp_path / name)
    with pytest.raises(DataError, match="hold no pictures"):
        read_webdataset(shard(tmp_path / "texts.tar", {"1.txt": b"x"}))
