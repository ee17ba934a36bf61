"""What the adapters share: lines in any encoding, CSV as people write it, splits by hash."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limner.data.archives import Entry
from limner.data.findings import Finding
from limner.data.sources import decode_lines, read_csv, split_of
from limner.errors import DataError

CELL = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


def rows(tmp_path: Path, data: bytes) -> tuple[list[tuple[str, str]], list[Finding]]:
    """What `read_csv` makes of a file."""
    path = tmp_path / "captions.txt"
    path.write_bytes(data)
    findings: list[Finding] = []
    return list(read_csv(Entry(path, path.name, len(data)), findings)), findings


# ---- lines


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"a\nb", [("a\n", True), ("b", True)]),
        (b"a\r\nb\r\n", [("a\r\n", True), ("b\r\n", True)]),
        ("\ufeffé\n".encode(), [("é\n", True)]),
        (b"caf\xe9\nok\n", [("café\n", False), ("ok\n", True)]),
        ("é\n犬".encode("utf-16"), [("é\n", True), ("犬", True)]),
        ("a\u2028b\x85c\n".encode(), [("a\u2028b\x85c\n", True)]),
    ],
)
def test_lines_are_read_as_what_they_are(data: bytes, lines: list[tuple[str, bool]]) -> None:
    assert list(decode_lines(data)) == lines


@given(st.binary(max_size=200))
def test_any_bytes_are_lines(data: bytes) -> None:
    assert all(isinstance(line, str) and line for line, _ in decode_lines(data))


# ---- CSV


@given(st.lists(st.tuples(CELL, CELL), max_size=6))
def test_a_csv_that_is_one_comes_back(tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("image", "caption"), *table])
    read, findings = rows(tmp_path_factory.getbasetemp(), text.getvalue().encode())
    assert read == [(name.strip(), caption) for name, caption in table]
    assert findings == []


@pytest.mark.parametrize(
    "header", ["image,caption", "file_name,text", "filename,captions", "Image , Caption", "\ufeffimage,caption"]
)
def test_the_usual_headers_are_known(tmp_path: Path, header: str) -> None:
    assert rows(tmp_path, f"{header}\na.jpg,A dog.\n".encode())[0] == [("a.jpg", "A dog.")]


def test_columns_are_found_wherever_they_are(tmp_path: Path) -> None:
    assert rows(tmp_path, b"text,number,file_name\nA dog,7,a.jpg\n")[0] == [("a.jpg", "A dog")]


def test_commas_that_were_not_quoted_stay_in_the_caption(tmp_path: Path) -> None:
    data = b'image,caption\na.jpg,A dog, a cat, and a bird .\nb.jpg,"One, two ."\n'
    assert rows(tmp_path, data)[0] == [("a.jpg", "A dog, a cat, and a bird ."), ("b.jpg", "One, two .")]


def test_a_row_that_is_too_short_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    read, findings = rows(tmp_path, b"image,caption\na.jpg,A dog\nb.jpg\n\nc.jpg,A cat\n")
    assert read == [("a.jpg", "A dog"), ("c.jpg", "A cat")]
    assert [(f.reason, f.detail, f.kept) for f in findings] == [("line can't be understood", "line 3: b.jpg", False)]


def test_bytes_that_are_not_utf8_are_read_as_windows_1252_and_named(tmp_path: Path) -> None:
    read, findings = rows(tmp_path, b'image,caption\na.jpg,A dog\nb.jpg,"Caf\xe9,\nterrace"\nc.jpg,Ok\n')
    assert read == [("a.jpg", "A dog"), ("b.jpg", "Café,\nterrace"), ("c.jpg", "Ok")]
    assert [(f.file, f.reason, f.kept) for f in findings] == [("b.jpg", "caption is not UTF-8", True)]


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\n", b"a.jpg,A dog\n", b"image;caption\na.jpg;A dog\n"])
def test_a_csv_without_header_is_refused_with_what_to_do(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError, match=r"captions\.txt has no header .* add it\."):
        rows(tmp_path, data)


@pytest.mark.parametrize(
    "data",
    [
        b'a.jpg,"A dog' + b" runs" * 50_000,
        b'a.jpg,"A dog\nb.jpg,A cat\n',
        b'a.jpg,"A dog\nb.jpg,"A cat"\n',
    ],
)
def test_a_csv_whose_quote_is_never_closed_is_refused(tmp_path: Path, data: bytes) -> None:
    """Or else it would take the captions after it for its own."""
    with pytest.raises(DataError, match="can't be read as CSV"):
        rows(tmp_path, b"image,caption\n" + data)


def test_a_header_that_is_broken_is_refused(tmp_path: Path) -> None:
    for data in (b'image,"caption', b"image," + b"caption" * 20_000):
        with pytest.raises(DataError, match="can't be read as CSV near line 1"):
            rows(tmp_path, data)


# ---- splits


def test_the_split_of_a_picture_never_changes() -> None:
    """Pinned: another hash would move pictures from test to train between versions."""
    splits = [split_of(f"{n}.jpg", 0, 0.2, 0.2) for n in range(8)]
    assert splits == ["val", "train", "test", "val", "val", "train", "train", "val"]
    assert splits != [split_of(f"{n}.jpg", 1, 0.2, 0.2) for n in range(8)], "the seed counts"


@given(seed=st.integers(), val=st.floats(0, 0.49), test=st.floats(0, 0.49))
def test_splits_have_the_shares_that_were_asked_for(seed: int, val: float, test: float) -> None:
    counts = Counter(split_of(f"{n}.jpg", seed, val, test) for n in range(2_000))
    assert abs(counts["val"] / 2_000 - val) < 0.06, "five standard deviations"
    assert abs(counts["test"] / 2_000 - test) < 0.06
    assert counts.total() == 2_000


@given(name=st.text(st.characters(exclude_categories=["Cs"])), seed=st.integers(), smaller=st.floats(0, 0.2))
def test_raising_a_share_moves_pictures_one_way(name: str, seed: int, smaller: float) -> None:
    """What is in test stays there when the share of test grows; without shares all is train."""
    if split_of(name, seed, 0.1, smaller) == "test":
        assert split_of(name, seed, 0.1, smaller + 0.3) == "test"
    assert split_of(name, seed, 0, 0) == "train"
