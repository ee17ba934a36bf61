"""Pictures in a folder or archive with captions beside them, and WebDataset's tar shards."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from limner.artifacts import LOCK
from limner.data.archives import Entry, base, escapes, list_folder, list_source, list_tar, read
from limner.data.findings import (
    BAD_LINE,
    ESCAPES,
    MISSING,
    NO_PICTURE,
    NOT_A_PICTURE,
    NOT_UTF8,
    SAID_TWICE,
    SAME_NAME,
    Finding,
    Rejected,
)
from limner.data.sources import SPLIT_NAMES, Picture, Source, decode_lines, is_picture_name, read_csv, read_text
from limner.errors import DataError

OUR_FILES = {"dataset.json", "report.html", "quarantine.jsonl", LOCK}  # a prepared dataset is a source, too


def read_imagefolder(path: Path) -> Source:
    """Pictures in a folder, zip or tar, with metadata.jsonl, metadata.csv or a .txt of captions beside each.

    Raises DataError where there is nothing of that kind.
    """
    entries, findings = list_source(path)
    names = {entry.name: entry for entry in entries}
    metadata = [entry for entry in entries if base(entry.name) in ("metadata.jsonl", "metadata.csv")]
    told = {PurePosixPath(entry.name).parent for entry in metadata if entry.name.endswith(".jsonl")}
    captions: dict[str, list[str]] = defaultdict(list)
    unsafe = {finding.file for finding in findings if finding.reason == ESCAPES}
    lost: dict[str, Finding] = {}  # one a picture, however many captions it has
    for entry in metadata:
        if entry.name.endswith(".csv") and PurePosixPath(entry.name).parent in told:
            findings.append(Finding(entry.name, SAID_TWICE, "metadata.jsonl beside it is read"))
            continue
        for name, texts in _metadata(entry, findings):
            inside = (PurePosixPath(entry.name).parent / name).as_posix()
            if escapes(name):
                if name not in unsafe:
                    lost[name] = Finding(name, ESCAPES, f"named in {entry.name}")
            elif inside in names:
                captions[inside].extend(texts)
            else:
                lost[inside] = Finding(inside, MISSING, f"named in {entry.name}")
    findings += lost.values()
    pictures = [entry for entry in entries if is_picture_name(entry.name) or entry.name in captions]
    if not pictures:
        raise DataError(f"{path} holds no pictures; give the folder or archive that holds them.")
    sidecars = _sidecars(entries, {entry.name for entry in pictures}, captions, findings)
    known = {entry.name for entry in [*pictures, *metadata]} | sidecars
    for entry in entries:
        if entry.name not in known and entry.name not in OUR_FILES:
            findings.append(Finding(entry.name, NOT_A_PICTURE, "its name is not that of a picture"))
    how = "metadata" if metadata else "captions in .txt files" if sidecars else "no captions"
    found = [Picture(entry, entry.name, tuple(captions[entry.name])) for entry in pictures]
    found, split_by = _split_by_folder(found)
    return Source(path.stem, f"pictures with {how}", found, findings, split_by)


def read_webdataset(path: Path) -> Source:
    """WebDataset tar shards: a sample is the files that share a name up to its first dot.

    Its picture is the first with a picture's extension; its captions are in `.txt` (one a line) or in `.json`
    ("captions", "caption" or "text"). Raises DataError where there are no shards.
    """
    if path.is_dir():
        entries, findings = list_folder(path)
        shards = [(entry.name, entry.path) for entry in entries if entry.name.endswith(".tar")]
    else:
        findings = []
        shards = [(path.name, path)]
        if not path.exists():
            raise DataError(f"The source {path} does not exist; give a tar shard or the folder of the shards.")
    if not shards:
        raise DataError(f"{path} holds no .tar shards; is it a source for `limner prepare imagefolder`?")
    pictures: list[Picture] = []
    for shard, file in shards:
        members, problems = list_tar(file)
        findings += [replace(problem, file=f"{shard}/{problem.file}") for problem in problems]
        samples: dict[str, list[Entry]] = defaultdict(list)
        for entry in members:
            folder, _, name = entry.name.rpartition("/")
            samples[f"{folder}/{name.split('.')[0]}"].append(entry)
        for sample in samples.values():
            pictures += _sample(shard, sample, findings)
    if not pictures:
        raise DataError(f"The shards of {path} hold no pictures; WebDataset names them KEY.jpg, KEY.png or KEY.webp.")
    pictures, split_by = _split_by_folder(pictures)
    return Source(path.stem, f"{len(shards)} WebDataset shard{'s' * (len(shards) > 1)}", pictures, findings, split_by)


def _metadata(entry: Entry, findings: list[Finding]) -> Iterator[tuple[str, list[str]]]:
    if entry.name.endswith(".csv"):
        for name, caption in read_csv(entry, findings):
            yield _comparable(name), [caption]
        return
    for number, (line, valid) in enumerate(decode_lines(read_text(entry)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, texts = _comparable(str(row["file_name"])), _texts(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            findings.append(Finding(entry.name, BAD_LINE, f"line {number}: {line.strip()[:100]}"))
            continue
        if not valid:
            findings.append(Finding(name, NOT_UTF8, f"{entry.name}, line {number}; read as Windows-1252", kept=True))
        yield name, texts


def _comparable(name: str) -> str:
    """A path in the form in which the names of a source are compared."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def _texts(row: dict[str, object]) -> list[str]:
    """The captions of a row of metadata, in whichever of the usual fields they are."""
    value = next((row[key] for key in ("captions", "caption", "text") if row.get(key) is not None), [])
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _sidecars(
    entries: Iterable[Entry], pictures: set[str], captions: dict[str, list[str]], findings: list[Finding]
) -> set[str]:
    """Add the captions in .txt files to those of the picture of the same name; return the names of these files."""
    by_stem = defaultdict(list)
    for name in pictures:
        by_stem[PurePosixPath(name).with_suffix("").as_posix()].append(name)
    used = set()
    for entry in entries:
        path = PurePosixPath(entry.name)
        if path.suffix.lower() != ".txt" or entry.name in pictures:
            continue
        used.add(entry.name)
        owners = by_stem.get(path.with_suffix("").as_posix())
        if not owners:
            findings.append(Finding(entry.name, NO_PICTURE))
            continue
        for owner in owners:
            if owner not in captions:  # metadata goes before
                captions[owner] = _caption_file(entry, owner, findings)
    return used


def _caption_file(entry: Entry, owner: str, findings: list[Finding]) -> list[str]:
    try:
        lines = list(decode_lines(read(entry, limit=1_000_000)))
    except Rejected as error:
        findings.append(Finding(entry.name, error.reason, error.detail))
        return []
    if not all(valid for _, valid in lines):
        findings.append(Finding(owner, NOT_UTF8, f"{entry.name}; read as Windows-1252", kept=True))
    return [line for line, _ in lines if line.strip()] or [""]


def _sample(shard: str, files: list[Entry], findings: list[Finding]) -> list[Picture]:
    """The picture of a WebDataset sample, if it has one."""
    pictures = [entry for entry in files if is_picture_name(entry.name)]
    texts = [entry for entry in files if entry.name.lower().endswith((".txt", ".json"))]
    if not pictures:
        findings += [Finding(f"{shard}/{entry.name}", NO_PICTURE) for entry in texts]
        return []
    name = f"{shard}/{pictures[0].name}"
    for entry in pictures[1:]:
        findings.append(Finding(f"{shard}/{entry.name}", SAME_NAME, f"its sample's picture is {pictures[0].name}"))
    captions: list[str] = []
    for entry in sorted(texts, key=lambda entry: entry.name.endswith(".txt")):  # json first: it may hold several
        if captions:
            break
        if entry.name.lower().endswith(".txt"):
            captions = _caption_file(entry, name, findings)
            continue
        try:
            captions = _texts(json.loads("".join(line for line, _ in decode_lines(read(entry, limit=1_000_000)))))
        except (Rejected, ValueError, AttributeError, RecursionError):
            findings.append(Finding(f"{shard}/{entry.name}", BAD_LINE, "not a JSON object with a caption"))
    return [Picture(pictures[0], name, tuple(captions))]


def _split_by_folder(pictures: list[Picture]) -> tuple[list[Picture], str | None]:
    """Take the splits from folders or shards named train, val and test, if all captioned pictures lie in such, or all
    where none has a caption."""
    splits = []
    for picture in pictures:
        parts = [part.lower() for part in picture.name.split("/")[:-1]]
        words = [re.split(r"[^a-z]", part)[0] if part.endswith(".tar") else part for part in parts]
        splits.append(next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None))
    told = {split for picture, split in zip(pictures, splits) if picture.captions} or {*splits}
    if None in told or "train" not in told:
        return pictures, None
    return [replace(p, split=split) for p, split in zip(pictures, splits)], "the source's train, val and test folders"
