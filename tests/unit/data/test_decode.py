"""Names that are safe, pictures that are written whole, and a journal that can be believed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limner.data.archives import Entry
from limner.data.checks import Limits
from limner.data.decode import INLINE, JOURNAL, Job, Journal, Outcome, decode_all, decode_one, plan_jobs, safe_stem
from limner.data.sources import Picture
from limner.errors import DataError, RunError
from photos import jpeg, put

NASTY = st.text(st.one_of(st.characters(), st.sampled_from('./\\:*?"<>|% \n\0_')), max_size=300)


# ---- names


@given(NASTY)
def test_a_stem_is_one_harmless_part_of_a_path(name: str) -> None:
    stem = safe_stem(name)
    assert 0 < len(stem.encode("utf-8")) <= 150
    assert not set('/\\:*?"<>|%\0\n\r\t') & set(stem)
    assert stem.isprintable()
    assert stem[0] not in " ._", "datasets passes over names that begin with a dot or two underscores"
    assert stem[-1] not in " ."
    root = Path("/root").resolve()
    assert (root / f"{stem}.jpg").resolve().parent == root


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a/b/IMG 01.final.JPG", "IMG 01.final"),
        ("Дворняга 犬.jpg", "Дворняга 犬"),
        ("../..", "picture"),
        (".jpg", "jpg"),
        ("...", "picture"),
        ("a:b?.png", "a_b"),
        ("犬" * 200 + ".jpg", "犬" * 50),
    ],
)
def test_a_stem_keeps_what_it_can(name: str, stem: str) -> None:
    assert safe_stem(name) == stem


def picture(name: str) -> Picture:
    """A picture of which only the name counts here."""
    return Picture(Entry(Path(name), name, 0), name, ())


@given(st.lists(NASTY | st.sampled_from(["a.jpg", "A.jpg", "b/a.png", "a-97e08a4b.jpg"]), unique=True, max_size=12))
def test_no_two_pictures_get_one_name_on_any_system(names: list[str]) -> None:
    pictures = [picture(name) for name in names]
    jobs = plan_jobs(pictures, ["train"] * len(names))
    stems = [job.stem.casefold() for job in jobs]
    assert len(set(stems)) == len(names)
    assert plan_jobs(pictures, ["train"] * len(names)) == jobs, "the same in every run"


# ---- decoding


def jobs_for(folder: Path, files: dict[str, bytes]) -> list[Job]:
    """Write files, and a job for each."""
    put(folder, files)
    return [Job(name, Entry(folder / name, name, len(data)), "train", name[:-4]) for name, data in files.items()]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A dataset folder to be."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_a_picture_is_written_and_stated(tmp_path: Path, out: Path) -> None:
    (job,) = jobs_for(tmp_path / "in", {"a.jpg": jpeg()})
    (outcome,) = decode_all([job], out, Limits(), 1)
    assert (outcome.name, outcome.file, outcome.reason) == ("a.jpg", "train/a.jpg", "")
    assert (out / "train" / "a.jpg").read_bytes() == jpeg()
    assert (outcome.size, outcome.width, outcome.height) == (len(jpeg()), 64, 48)


def test_a_rejected_picture_leaves_no_file(tmp_path: Path, out: Path) -> None:
    (outcome,) = decode_all(jobs_for(tmp_path / "in", {"a.jpg": b"text"}), out, Limits(), 1)
    assert (outcome.file, outcome.reason) == ("", "not a picture")
    assert not list(out.glob("*/*"))


def test_a_disk_that_is_full_leaves_no_half_picture(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    (job,) = jobs_for(tmp_path / "in", {"a.jpg": jpeg()})
    (out / "train").mkdir()
    (out / "train" / f".a.jpg.{os.getpid()}.partial").symlink_to(full)
    with pytest.raises(OSError) as caught:
        decode_one(job, out, Limits())
    assert caught.value.errno == errno.ENOSPC
    assert not list((out / "train").iterdir())


def test_processes_do_what_one_does_and_a_killed_one_is_told(tmp_path: Path, out: Path) -> None:
    files = {f"{n}.jpg": jpeg(n) if n % 10 else b"text" for n in range(INLINE + 200)}
    jobs = jobs_for(tmp_path / "in", files)
    alone = sorted(map(str, decode_all(jobs, out, Limits(), 1)))
    assert sorted(map(str, decode_all(jobs, out, Limits(), 2))) == alone

    outcomes = decode_all(jobs, out, Limits(), 2)
    next(outcomes)
    for process in multiprocessing.active_children():
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match="died; run the same command again") as caught:
        list(outcomes)
    assert "\n" not in str(caught.value)


# ---- the journal

IDENTITY = {"settings": {"size": 8}, "sha256": "0" * 64}


def outcomes_in(out: Path, count: int) -> list[Outcome]:
    """Outcomes whose files are there, and one that was rejected."""
    put(out, {f"train/{n}.jpg": b"x" * n for n in range(count)})
    written = [Outcome(f"{n}.jpg", f"train/{n}.jpg", n, 1, 2, "hash", 3, ("turned upright",)) for n in range(count)]
    return [*written, Outcome("bad.jpg", reason="empty file", detail="of nothing")]


def test_a_journal_comes_back(out: Path) -> None:
    journal = Journal(out, IDENTITY)
    assert journal.outcomes() == {}
    outcomes = outcomes_in(out, 3)
    assert list(journal.record(iter(outcomes), [])) == outcomes
    assert list(Journal(out, IDENTITY).outcomes().values()) == outcomes


def test_a_journal_is_continued(out: Path) -> None:
    outcomes = outcomes_in(out, 3)
    list(Journal(out, IDENTITY).record(iter(outcomes[:2]), []))
    journal = Journal(out, IDENTITY)
    list(journal.record(iter(outcomes[2:]), list(journal.outcomes().values())))
    assert list(journal.outcomes().values()) == outcomes


def test_each_outcome_is_noted_before_the_next_is_awaited(out: Path) -> None:
    journal = Journal(out, IDENTITY)
    recording = journal.record(iter(outcomes_in(out, 3)), [])
    for done in range(1, 4):
        next(recording)
        assert len(journal.outcomes()) == done


@pytest.mark.parametrize("cut", range(1, 400, 23))
def test_a_journal_that_was_cut_off_holds_what_is_whole(out: Path, cut: int) -> None:
    outcomes = outcomes_in(out, 3)
    list(Journal(out, IDENTITY).record(iter(outcomes), []))
    file = out / JOURNAL
    data = file.read_bytes()
    file.write_bytes(data[:-cut])
    found = list(Journal(out, IDENTITY).outcomes().values())
    assert found == outcomes[: len(found)]
    lines = [json.dumps(asdict(outcome)) for outcome in outcomes]
    assert len(found) >= len(outcomes) - 1 - cut // min(map(len, lines))


def test_a_picture_that_went_or_changed_its_size_is_done_again(out: Path) -> None:
    outcomes = outcomes_in(out, 3)
    list(Journal(out, IDENTITY).record(iter(outcomes), []))
    (out / "train" / "0.jpg").unlink()
    (out / "train" / "1.jpg").write_bytes(b"something else")
    assert set(Journal(out, IDENTITY).outcomes()) == {"2.jpg", "bad.jpg"}


def test_a_journal_of_something_else_is_refused(out: Path) -> None:
    list(Journal(out, IDENTITY).record(iter([]), []))
    with pytest.raises(DataError, match="unfinished run with another source or settings"):
        Journal(out, {**IDENTITY, "sha256": "1" * 64}).outcomes()
