"""What lies in a folder, a zip or a tar: listed by name, read one by one, never extracted to disk."""

from __future__ import annotations

import os
import re
import stat
import tarfile
import unicodedata
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256 as new_sha256
from pathlib import Path
from typing import Literal

from limner.artifacts import sha256
from limner.data.findings import ESCAPES, SAME_NAME, UNREADABLE, Finding, Rejected
from limner.errors import DataError

MOST_BYTES = 200_000_000  # of one unpacked file: more is a zip bomb, or no photograph
BOOKKEEPING = {".ds_store", "thumbs.db", "desktop.ini", "__macosx"}  # of operating systems


@dataclass(frozen=True)
class Entry:
    """A file in a source. `name` is its path there, with forward slashes; `at` its place in the archive."""

    path: Path
    """The file itself, or the archive that holds it."""
    name: str
    size: int
    kind: Literal["file", "zip", "tar"] = "file"
    at: int = 0
    """zip: number of the entry; tar: offset of its first byte."""


Listing = tuple[list[Entry], list[Finding]]


def list_source(source: Path) -> Listing:
    """All files of a folder, a zip or a tar, sorted by name, and what must not be read.

    Raises DataError where `source` is missing or is something else, PermissionError where it must not be read.
    """
    if source.is_dir():
        return list_folder(source)
    if not source.exists():
        raise DataError(f"The source {source} does not exist; give the folder or archive that you downloaded.")
    if not source.is_file():
        raise DataError(f"The source {source} is neither a folder nor a zip or tar archive.")
    if zipfile.is_zipfile(source):
        return list_zip(source)
    if source.suffix == ".tar" or tarfile.is_tarfile(source):
        return list_tar(source)
    what = "a damaged or incomplete zip; fetch it again" if source.suffix == ".zip" else "no folder, zip or tar archive"
    raise DataError(f"The source {source} is {what}.")


def list_folder(folder: Path) -> Listing:
    """All regular files below `folder`. Links that lead out of it are findings; links to folders are not followed."""
    entries: list[Entry] = []
    findings: list[Finding] = []
    root = folder.resolve()

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        findings.append(Finding(_relative(Path(error.filename), folder), UNREADABLE, error.strerror or ""))

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _bookkeeping(name))
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in sorted([*files, *links]):
            path = Path(parent) / name
            shown = _relative(path, folder)
            if _bookkeeping(name):
                continue
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                findings.append(Finding(shown, ESCAPES, f"a link to {path.readlink()}"))
                continue
            try:
                facts = path.stat()
            except OSError as error:
                findings.append(Finding(shown, UNREADABLE, error.strerror or ""))
                continue
            if stat.S_ISREG(facts.st_mode):
                entries.append(Entry(path, shown, facts.st_size))
            elif not stat.S_ISDIR(facts.st_mode):  # reading a pipe would never end
                findings.append(Finding(shown, UNREADABLE, "not a regular file"))
    entries, same = _safe(entries)
    return entries, findings + same


def list_zip(path: Path) -> Listing:
    """All files of a zip. Raises DataError where it is damaged."""
    try:
        infos = _zip(*_version(path)).infolist()
    except PermissionError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path} is a damaged or incomplete zip ({error}); fetch it again.") from None
    members = [
        Entry(path, _zip_name(info), info.file_size, "zip", at) for at, info in enumerate(infos) if not info.is_dir()
    ]
    return _safe(members)


def list_tar(path: Path) -> Listing:
    """All regular files of an uncompressed tar; where it ends early, those before the damage and a finding."""
    members: list[Entry] = []
    findings: list[Finding] = []
    try:
        with tarfile.open(path, "r:") as archive:
            try:
                for info in archive:
                    if info.isreg():
                        members.append(Entry(path, _name(info.name), info.size, "tar", info.offset_data))
                    elif not info.isdir():
                        findings.append(Finding(_name(info.name), UNREADABLE, "not a regular file"))
            except (tarfile.TarError, OSError, ValueError) as error:
                findings.append(Finding(path.name, "archive ends early", str(error)))
    except (tarfile.TarError, ValueError, EOFError):
        raise DataError(f"{path} is no uncompressed tar; unpack it, or decompress it to a plain .tar.") from None
    entries, unsafe = _safe(members)
    return entries, findings + unsafe


def read(entry: Entry, limit: int = MOST_BYTES) -> bytes:
    """The content of a file. Raises Rejected where it can't be read or is larger than `limit` bytes."""
    if entry.size > limit:
        raise Rejected("file too large", f"{entry.size} bytes")
    try:
        if entry.kind == "zip":
            archive = _zip(*_version(entry.path))
            with archive.open(archive.infolist()[entry.at]) as member:
                data = member.read(entry.size + 1)
        else:
            with entry.path.open("rb") as file:
                file.seek(entry.at)
                data = file.read(entry.size)
    except Exception as error:  # damaged and encrypted archives raise what each decompressor likes
        raise Rejected(UNREADABLE, str(getattr(error, "strerror", None) or error)) from None
    if len(data) < entry.size:
        raise Rejected(UNREADABLE, "the file ends early")
    return data


def digests(source: Path) -> tuple[str, dict[str, str]]:
    """SHA-256 of a source as a whole, and of each of its files.

    Of a folder the hash is over the names and hashes of its files, so that it does not depend on where it lies.
    """
    if source.is_file():
        digest = sha256(source)
        return digest, {source.name: digest}
    files = {}
    for entry in list_folder(source)[0]:
        try:
            files[entry.name] = sha256(entry.path)
        except OSError:
            files[entry.name] = "unreadable"
    lines = "".join(f"{name}\t{digest}\n" for name, digest in files.items())
    return new_sha256(lines.encode()).hexdigest(), files


def base(name: str) -> str:
    """The last part of a path in any system's writing, in one Unicode form, so that names can be compared."""
    return unicodedata.normalize("NFC", name.replace("\\", "/").rsplit("/", 1)[-1])


def escapes(name: str) -> bool:
    """Whether a name in an archive or a list would lead out of the folder it is meant for."""
    name = name.replace("\\", "/")
    return name.startswith("/") or bool(re.match(r"[A-Za-z]:", name)) or ".." in name.split("/")


def _safe(members: list[Entry]) -> Listing:
    entries: list[Entry] = []
    findings: list[Finding] = []
    seen: set[str] = set()
    for entry in sorted(members, key=lambda entry: (entry.name, entry.at)):
        if any(_bookkeeping(part) for part in entry.name.split("/")):
            continue
        if escapes(entry.name):
            findings.append(Finding(entry.name, ESCAPES))
        elif entry.name in seen:
            findings.append(Finding(entry.name, SAME_NAME, "the first is used"))
        else:
            seen.add(entry.name)
            entries.append(entry)
    return entries, findings


def _bookkeeping(name: str) -> bool:
    return name.lower() in BOOKKEEPING or name.startswith("._")


def _relative(path: Path, folder: Path) -> str:
    return _name(path.relative_to(folder).as_posix())


def _name(name: str) -> str:
    """A name that can be printed and compared, whatever bytes the file system holds."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))


def _zip_name(info: zipfile.ZipInfo) -> str:
    name = info.filename
    if not info.flag_bits & 0x800:  # not marked as UTF-8, though most programs write it
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return _name(name.replace("\\", "/")).removeprefix("./")


def _version(path: Path) -> tuple[Path, int, int]:
    facts = path.stat()
    return path, facts.st_mtime_ns, facts.st_size


@lru_cache(maxsize=8)  # a worker reads thousands of entries of the same archive
def _zip(path: Path, modified: int, size: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)
