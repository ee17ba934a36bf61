"""What a source holds, whatever its layout: pictures with captions and perhaps a split.

An adapter is a function from a path to a `Source`; it lists and parses, and decodes nothing. The adapters are in
`flickr8k.py` and `folders.py`; here is what they share.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from limner.data.archives import Entry, read
from limner.data.checks import CLIP_LENGTH, clean_caption, estimate_tokens, is_junk
from limner.data.dataset import Split
from limner.data.findings import (
    BAD_LINE,
    NO_CAPTION,
    NOT_UTF8,
    Finding,
    Rejected,
)
from limner.errors import DataError

PICTURE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".avif"),
    *(".heic",),  # named as a picture, and then found unreadable
}
SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


@dataclass(frozen=True)
class Picture:
    """A picture of a source. `name` is the same in whatever archive it lies; `split` is None where none is given."""

    entry: Entry
    name: str
    captions: tuple[str, ...]
    split: Split | None = None


@dataclass
class Source:
    """What an adapter found."""

    name: str
    layout: str
    """The layout, in words that complete "found ..."."""
    pictures: list[Picture]
    findings: list[Finding] = field(default_factory=list)
    split_by: str | None = None
    """Where the source says which picture belongs to which split; None where it does not."""
    licence: str = "not stated by the source"


def is_picture_name(name: str) -> bool:
    """Whether a name ends as those of pictures do."""
    return PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES


def prepare_captions(source: Source, *, uncaptioned: bool) -> tuple[list[Picture], list[Finding]]:
    """The pictures with clean captions, and what was found wrong with them.

    An empty caption is dropped, and a picture that has none left unless `uncaptioned`. One that says nothing or is
    longer than CLIP reads is kept and listed: Flickr8k has both, and is compared by its five captions a picture.
    """
    pictures: list[Picture] = []
    findings: list[Finding] = []
    for picture in source.pictures:
        captions = [clean_caption(text) for text in picture.captions]
        for raw, caption in zip(picture.captions, captions):
            if not caption:
                findings.append(Finding(picture.name, "empty caption", raw.strip()))
            elif is_junk(caption):
                findings.append(Finding(picture.name, "caption says nothing", caption, kept=True))
            elif (tokens := estimate_tokens(caption)) > CLIP_LENGTH:
                detail = f"about {tokens}: {caption[:60]}..."
                findings.append(Finding(picture.name, f"caption over {CLIP_LENGTH} CLIP tokens", detail, kept=True))
        captions = [caption for caption in captions if caption]
        if captions or uncaptioned:
            pictures.append(replace(picture, captions=tuple(captions)))
        else:
            findings.append(Finding(picture.name, NO_CAPTION))
    return pictures, findings


def split_of(name: str, seed: int, val_share: float, test_share: float) -> Split:
    """The split of a picture by the hash of seed and name: the same on every machine and whatever else is there."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < test_share:
        return "test"
    return "val" if share < test_share + val_share else "train"


def decode_lines(data: bytes) -> Iterator[tuple[str, bool]]:
    """The lines of a text file with their ends, each with whether it was valid Unicode; if not, as Windows-1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        data = data.decode("utf-16", "replace").encode()
    for line in data.removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True):
        try:
            yield line.decode("utf-8"), True
        except UnicodeDecodeError:
            yield line.decode("cp1252", "replace"), False


def read_text(entry: Entry) -> bytes:
    """The content of a file without which nothing goes on. Raises DataError."""
    try:
        return read(entry)
    except Rejected as error:
        raise DataError(f"{entry.name} of the source {error.reason} ({error.detail}); fetch it again.") from None


def read_csv(entry: Entry, findings: list[Finding]) -> Iterator[tuple[str, str]]:
    """File name and caption of each row of a CSV. Raises DataError where its header does not name such columns."""
    lines = list(decode_lines(read_text(entry)))
    # strict, or else a quote that is never closed would take all rows after it for one caption
    rows = csv.reader((line.replace("\0", "") for line, _ in lines), strict=True)
    try:
        header = [cell.strip().lower() for cell in next(rows, [])]
    except csv.Error as error:
        raise _broken(entry, rows.line_num, error) from None
    name_at = next((header.index(c) for c in ("file_name", "image", "filename") if c in header), None)
    text_at = next((header.index(c) for c in ("text", "caption", "captions") if c in header), None)
    if name_at is None or text_at is None:
        raise DataError(f"{entry.name} has no header with an image or file_name and a caption or text column; add it.")
    before = rows.line_num
    try:
        for row in rows:
            first, before = before, rows.line_num
            if len(row) <= max(name_at, text_at):
                if row:
                    findings.append(Finding(entry.name, BAD_LINE, f"line {before}: {','.join(row)}"[:200]))
                continue
            if text_at == len(header) - 1:
                row[text_at:] = [",".join(row[text_at:])]  # a caption with commas that was not quoted
            name = row[name_at].strip()
            if not all(valid for _, valid in lines[first:before]):
                findings.append(Finding(name, NOT_UTF8, f"{entry.name}, line {before}; read as Windows-1252", True))
            yield name, row[text_at]
    except csv.Error as error:
        raise _broken(entry, rows.line_num, error) from None


def _broken(entry: Entry, line: int, error: csv.Error) -> DataError:
    return DataError(f"{entry.name} can't be read as CSV near line {line} ({error}); mend it.")
