"""What `limner evaluate` compares: each a set of pictures with the caption that each was drawn for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limner.data.checks import clean_caption
from limner.data.dataset import Record
from limner.data.findings import BAD_LINE, ESCAPES, UNREADABLE, Finding
from limner.data.folders import read_imagefolder
from limner.data.pictures import read_picture
from limner.data.sources import is_picture_name
from limner.errors import ConfigError, DataError

PHOTOGRAPHS = "photographs"  # the label of the real ones
LEAST = 4  # pictures that have a spread of which an interval can be told
SHOWN = 3  # names in a sentence


@dataclass(frozen=True)
class Contender:
    """Pictures of one origin, each with one caption."""

    label: str
    """What the report calls it."""
    records: Sequence[Record]
    facts: dict[str, Any]
    """What is known of the origin, ready for JSON: "model" and "sha256", "steps", ..., or "folder"."""
    settings: dict[str, float] = field(default_factory=dict)
    """What it differs in from others, by name, for the plots: steps, guidance, alpha, ..."""
    skipped: Sequence[Finding] = ()
    """Pictures that can't be read, which no figure counts."""
    remarks: Sequence[str] = ()
    """What a reader of its figures should know."""

    @property
    def captions(self) -> list[str]:
        """The caption of each picture."""
        return [record.captions[0] for record in self.records]

    @property
    def keys(self) -> list[tuple[str, int]]:
        """What tells that two contenders' pictures were drawn for the same: the caption, and which of its pictures."""
        seen: Counter[str] = Counter()
        keys = []
        for caption in self.captions:
            keys.append((caption, seen[caption]))
            seen[caption] += 1
        return keys


def photographs(records: Sequence[Record], n: int | None) -> list[Record]:
    """The first `n` captioned photographs, each with its first caption alone."""
    captioned = [Record(record.path, record.captions[:1]) for record in records if record.captions]
    return captioned[:n]


def from_folder(folder: Path, label: str, real: Sequence[Record], others: Container[str] = ()) -> Contender:
    """The pictures of a folder, in any format. metadata.jsonl, metadata.csv or .txt files give captions as for
    `limner prepare imagefolder`, or else the names do: those of the photographs `real`, whatever their endings.
    Pictures named as `others`, photographs that are not asked for, are passed over.

    Raises DataError where the folder has no pictures, one of them has no caption, a line of captions can't be
    understood, or none can be read.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; name one of pictures as --images.")
    by_name = {record.path.stem: record.captions[0] for record in real}
    source = read_imagefolder(folder)
    for finding in source.findings:
        if finding.reason == BAD_LINE:  # whose picture would be scored against another caption
            raise DataError(f"{finding.file} in {folder} can't be understood ({finding.detail}); mend it.")
    skipped = [one for one in source.findings if one.reason in (ESCAPES, UNREADABLE) and is_picture_name(one.file)]
    records, uncaptioned, sizes = [], [], Counter[tuple[int, int]]()
    for picture in source.pictures:
        own = [text for text in map(clean_caption, picture.captions) if text]
        caption = own[0] if own else by_name.get(Path(picture.name).stem)
        if caption is None:
            if Path(picture.name).stem not in others:
                uncaptioned.append(picture.name)
            continue
        try:
            sizes[read_picture(picture.entry.path).size] += 1
        except DataError:
            skipped.append(Finding(picture.name, UNREADABLE))
        else:
            records.append(Record(picture.entry.path, (caption,)))
    if uncaptioned:
        raise DataError(
            f"{folder} has {len(records) + len(skipped) + len(uncaptioned)} pictures, of which "
            f"{len(uncaptioned)} have no caption ({_some(uncaptioned)}); write them into its metadata.jsonl, or name "
            "the pictures as the photographs are named."
        )
    if len(records) < LEAST:
        raise DataError(f"{folder} has {len(records)} pictures that can be read; {LEAST} are the least to score.")
    return Contender(label, records, {"folder": str(folder)}, skipped=skipped, remarks=_remarks(skipped, sizes))


def _remarks(skipped: Sequence[Finding], sizes: Counter[tuple[int, int]]) -> list[str]:
    remarks = []
    if skipped:
        count = f"{len(skipped)} picture{'s' if len(skipped) > 1 else ''}"
        remarks.append(f"{count} can't be read and {'are' if len(skipped) > 1 else 'is'} left out: {names(skipped)}.")
    if len(sizes) > 1:
        ((width, height), most), *_ = sizes.most_common()
        remarks.append(
            f"{sizes.total() - most} of {sizes.total()} pictures are not {width}x{height}, as the most are; all are "
            "brought to the size that a network reads."
        )
    return remarks


def names(findings: Iterable[Finding]) -> str:
    """The files of findings, for a sentence."""
    return _some([finding.file for finding in findings])


def _some(files: Sequence[str]) -> str:
    more = len(files) - SHOWN
    return ", ".join(files[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def labels(refs: Sequence[str]) -> list[str]:
    """A short name for each model or folder: as many of its last parts as tell it from all others and the photographs.

    Raises ConfigError where one is given twice.
    """
    whole = [Path(ref).expanduser().resolve() if Path(ref).expanduser().is_dir() else Path(ref) for ref in refs]
    if twice := [ref for ref, path in zip(refs, whole) if whole.count(path) > 1]:
        raise ConfigError(f"{twice[0]} is given twice; compare it with another.")
    for count in range(1, max(len(path.parts) for path in whole)):
        short = ["/".join(path.parts[-count:]) for path in whole]
        if len(set(short) - {PHOTOGRAPHS}) == len(short):
            return short
    return [str(path) for path in whole]
