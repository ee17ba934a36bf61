"""A folder, a zip and a tar of the same files are the same source; what is unsafe or damaged is named, never read."""

from __future__ import annotations

import io
import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import no_special_rights
from limner.data.archives import Entry, base, digests, escapes, list_folder, list_source, list_tar, list_zip, read
from limner.data.findings import Finding, Rejected
from limner.errors import DataError
from photos import put

FILES = {"a.txt": b"one", "b/c.txt": b"two", "b/ünïcode 犬.txt": b"three", "empty": b""}
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    """A compressed zip. -> `path`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    """A tar, uncompressed if `mode` does not say otherwise. -> `path`."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def found(findings: list[Finding]) -> dict[str, str]:
    """Reasons by file."""
    return {finding.file: finding.reason for finding in findings}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_files_are_listed_sorted_and_read(tmp_path: Path, kind: str) -> None:
    make = {"folder": put, "zip": make_zip, "tar": make_tar}[kind]
    entries, findings = list_source(make(tmp_path / f"source.{kind}", FILES))
    assert [(entry.name, read(entry)) for entry in entries] == sorted(FILES.items())
    assert [entry.size for entry in entries] == [len(FILES[entry.name]) for entry in entries]
    assert findings == []


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_that_lead_out_of_an_archive_are_named_and_not_listed(tmp_path: Path, kind: str) -> None:
    names = ["../a", "b/../../c", "/etc/passwd", "C:\\a", "C:/a", "..\\a", "b\\..\\..\\c"]
    make = make_zip if kind == "zip" else make_tar
    entries, findings = list_source(make(tmp_path / f"x.{kind}", {**dict.fromkeys(names, b"x"), "good..name": b""}))
    assert [entry.name for entry in entries] == ["good..name"]
    assert len(findings) >= 5, "some are the same path in two writings"
    assert set(found(findings).values()) <= {"path leads out of the source", "name appears twice"}
    assert {name.replace("\\", "/") for name in found(findings)} == {name.replace("\\", "/") for name in names}


@given(st.text(st.sampled_from("ab./\\:C"), min_size=1, max_size=12))
def test_a_path_that_does_not_escape_stays_inside(name: str) -> None:
    if not escapes(name):
        inside = Path(os.path.normpath(Path("/root") / name.replace("\\", "/")))
        assert inside.is_relative_to("/root")


@given(st.text(max_size=20))
def test_a_base_name_has_no_folder_and_one_form(name: str) -> None:
    assert not set("/\\") & set(base(name))
    assert base(base(name)) == base(name)
    assert base(unicodedata.normalize("NFD", name)) == base(unicodedata.normalize("NFC", name))


def test_bookkeeping_of_operating_systems_is_passed_over(tmp_path: Path) -> None:
    names = ["__MACOSX/._a.jpg", ".DS_Store", "b/Thumbs.db", "b/._a.jpg", "desktop.ini", "a.jpg"]
    files = dict.fromkeys(names, b"x")
    for source in (
        put(tmp_path / "x", files),
        make_zip(tmp_path / "x.zip", files),
        make_tar(tmp_path / "x.tar", files),
    ):
        entries, findings = list_source(source)
        assert ([entry.name for entry in entries], findings) == (["a.jpg"], [])


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_a_name_that_appears_twice_the_first_is_used(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", b"first")
        archive.writestr("a", b"second")
    (entry,), findings = list_source(tmp_path / "x.zip")
    assert read(entry) == b"first"
    assert found(findings) == {"a": "name appears twice"}


def test_names_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    for source in (make_zip(tmp_path / "x.zip", {"cafe\u0301": b""}), put(tmp_path / "x", {"cafe\u0301": b""})):
        assert [entry.name for entry in list_source(source)[0]] == ["café"]


def test_a_zip_that_does_not_say_that_its_names_are_utf8(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"犬.jpg": b"x"})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x00\x08\x08\x00", b"\x00\x00\x08\x00"))  # flag bit 11 off, everywhere
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() != ["犬.jpg"], "else this tests nothing"
    assert [entry.name for entry in list_source(path)[0]] == ["犬.jpg"]


@posix
def test_names_that_are_no_unicode_can_be_listed_and_read(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"x")
    (entry,), _ = list_folder(tmp_path)
    assert entry.name == "caf\ufffd.jpg"
    assert read(entry) == b"x"


@posix
def test_links_are_followed_within_the_source_only(tmp_path: Path) -> None:
    put(tmp_path, {"outside/secret": b"x", "source/a": b"in"})
    source = tmp_path / "source"
    (source / "inside").symlink_to(source / "a")
    (source / "outside").symlink_to(tmp_path / "outside" / "secret")
    (source / "folder").symlink_to(tmp_path / "outside")
    (source / "circle").symlink_to(source / "circle")
    (source / "dangling").symlink_to(source / "nowhere")
    os.mkfifo(source / "pipe")
    entries, findings = list_folder(source)
    assert [(entry.name, read(entry)) for entry in entries] == [("a", b"in"), ("inside", b"in")]
    assert found(findings) == {
        "outside": "path leads out of the source",
        "folder": "path leads out of the source",
        "circle": "can't be read",
        "dangling": "can't be read",
        "pipe": "can't be read",
    }


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    entries, findings = list_tar(tmp_path / "x.tar")
    assert (entries, found(findings)) == ([], {"link": "can't be read"})


# ---- wrong and damaged sources


@posix
def test_a_source_that_is_none_is_refused_in_one_sentence(tmp_path: Path) -> None:
    good = make_zip(tmp_path / "good.zip", {"a": b"x" * 1000})
    put(tmp_path, {"text.txt": b"hello", "cut.zip": good.read_bytes()[:60], "empty.zip": b"", "empty.tar": b""})
    for name, sentence in {
        "missing": "does not exist",
        "text.txt": "no folder, zip or tar archive",
        "cut.zip": "damaged or incomplete zip; fetch it again",
        "empty.zip": "damaged or incomplete zip",
        "empty.tar": "no uncompressed tar",
    }.items():
        with pytest.raises(DataError, match=sentence) as caught:
            list_source(tmp_path / name)
        assert "\n" not in str(caught.value)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a folder nor"):
        list_source(tmp_path / "pipe")
    with pytest.raises(DataError, match="damaged or incomplete zip"):
        list_zip(tmp_path / "cut.zip")


def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no uncompressed tar; unpack it"):
        list_source(make_tar(tmp_path / "x.tar.gz", FILES, "w:gz"))


def test_a_tar_that_ends_early_gives_what_lies_before(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "x.tar", {"a": b"a" * 600, "b": b"b" * 600, "c": b"c" * 600}).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 512 + 1024 + 512 + 300])  # amid the content of b
    entries, findings = list_tar(tmp_path / "x.tar")
    assert [entry.name for entry in entries] == ["a", "b"]
    assert read(entries[0]) == b"a" * 600
    assert found(findings) == {"x.tar": "archive ends early"}
    with pytest.raises(Rejected, match="ends early"):
        read(entries[1])


def test_damaged_content_of_a_zip_is_rejected_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a", b"content of a")
        archive.writestr("b", b"content of b")
    path.write_bytes(path.read_bytes().replace(b"content of a", b"CONTENT of a"))
    a, b = list_zip(path)[0]
    with pytest.raises(Rejected, match="can't be read"):
        read(a)
    assert read(b) == b"content of b"


def test_a_file_over_the_limit_is_rejected_unread(tmp_path: Path) -> None:
    bomb = make_zip(tmp_path / "x.zip", {"zeros": b"\0" * 1_000_000})
    assert bomb.stat().st_size < 2_000
    (entry,), _ = list_zip(bomb)
    with pytest.raises(Rejected, match="file too large"):
        read(entry, limit=999_999)
    assert len(read(entry, limit=1_000_000)) == 1_000_000
    huge = Entry(tmp_path / "not even there", "huge", 10**12)
    with pytest.raises(Rejected, match="file too large"):
        read(huge)


def test_a_file_that_shrank_or_went_since_it_was_listed_is_rejected(tmp_path: Path) -> None:
    (entry,), _ = list_folder(put(tmp_path / "x", {"a": b"content"}))
    (tmp_path / "x" / "a").write_bytes(b"con")
    with pytest.raises(Rejected, match="ends early"):
        read(entry)
    (tmp_path / "x" / "a").unlink()
    with pytest.raises(Rejected, match="No such file"):
        read(entry)


def test_what_there_is_no_right_to_read_is_named() -> None:
    with no_special_rights() as folder:
        source = put(folder / "source", {"a": b"x", "b": b"x", "locked/c": b"x"})
        (source / "b").chmod(0)
        (source / "locked").chmod(0)
        entries, findings = list_folder(source)
        assert [entry.name for entry in entries] == ["a", "b"]
        assert found(findings) == {"locked": "can't be read"}
        with pytest.raises(Rejected, match="Permission denied"):
            read(entries[1])
        assert digests(source)[1]["b"] == "unreadable"
        (source / "locked").chmod(0o700)
        source.chmod(0)
        with pytest.raises(PermissionError):
            list_source(source)


# ---- digests


def test_the_digest_of_a_folder_is_of_its_names_and_contents(tmp_path: Path) -> None:
    one = digests(put(tmp_path / "one", FILES))
    assert digests(put(tmp_path / "two" / "deep", dict(reversed(FILES.items())))) == one, "wherever it lies"
    assert list(one[1]) == sorted(FILES)
    for change in ({**FILES, "a.txt": b"ONE"}, {**FILES, "new": b""}, {k.upper(): v for k, v in FILES.items()}):
        assert digests(put(tmp_path / f"{len(list(tmp_path.iterdir()))}", change))[0] != one[0]


def test_the_digest_of_an_archive_is_that_of_the_file(tmp_path: Path) -> None:
    import hashlib

    path = make_zip(tmp_path / "x.zip", FILES)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digests(path) == (digest, {"x.zip": digest})
