"""`limner prepare` from a source to a dataset folder: what it holds, how it goes on after a stop, what it refuses."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from PIL import Image

from commands import limner, no_special_rights
from limner.artifacts import alone, sha256_folder
from limner.config import PrepareConfig
from limner.data.archives import digests
from limner.data.dataset import SPLITS, read_split
from limner.data.decode import JOURNAL
from limner.errors import DataError, UserError
from limner.settings import resolve
from limner.stages import prepare
from photos import encoded, jpeg, photo, pixels_of, put

COUNT = 24
FILES = ("dataset.json", "quarantine.jsonl", "report.html")
SHARES = {"val_share": 0.2, "test_share": 0.2}  # so that each split of so few pictures has some


def config(source: Path, out: Path, kind: str = "imagefolder", **settings: object) -> PrepareConfig:
    """The configuration of a run."""
    return resolve(PrepareConfig, {"kind": kind, "source": source, "out": out, **settings})


def photographs(folder: Path, count: int = COUNT, **sizes: int) -> Path:
    """A source of JPEGs with two captions each, and one file that is no picture. -> `folder`."""
    rows = [{"file_name": f"{n}.jpg", "captions": [f"Photograph {n} .", "A dog ."]} for n in range(count)]
    rows.append({"file_name": "notes.jpg", "captions": ["No picture ."]})
    metadata = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files = {f"{n}.jpg": jpeg(n, **sizes) for n in range(count)}
    return put(folder, {**files, "metadata.jsonl": metadata, "notes.jpg": b"text"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Some photographs."""
    return photographs(tmp_path / "source")


def contents(out: Path) -> dict[str, tuple[tuple[str, ...], bytes]]:
    """Captions and bytes of the train pictures by name."""
    return {record.path.name: (record.captions, record.path.read_bytes()) for record in read_split(out, "train")}


def facts_of(out: Path) -> dict[str, Any]:
    """The content of dataset.json."""
    facts: dict[str, Any] = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    return facts


def everything(folder: Path) -> dict[str, str]:
    """Hashes of all files, hidden ones too."""
    assert not list(folder.rglob("*.partial"))
    return sha256_folder(folder)


# ---- the dataset folder


def test_the_folder_holds_what_was_promised(source: Path, tmp_path: Path) -> None:
    out = prepare.run(config(source, tmp_path / "data", **SHARES))
    facts = facts_of(out)
    assert {path.name for path in out.iterdir()} == {*SPLITS, *FILES, ".lock"}
    assert sum(facts["counts"].values()) == COUNT
    assert facts["captions"] == {split: 2 * count for split, count in facts["counts"].items()}
    assert facts["source"]["sha256"] == digests(source)[0]
    for split in SPLITS:
        records = read_split(out, split)
        assert len(records) == facts["counts"][split] > 0
        assert {p.name for p in (out / split).iterdir()} == {r.path.name for r in records} | {"metadata.jsonl"}
        for record in records:
            number = int(record.path.stem)
            assert record.captions == (f"Photograph {number}.", "A dog.")
            assert record.path.read_bytes() == jpeg(number), "a sound JPEG keeps its bytes"
    findings = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["file"], row["reason"]) for row in findings] == [("notes.jpg", "not a picture")]


NAMES = [f"{stem}.jpg" for stem in ("test-drive", "val #1 & 2", "[train]*?", "__hidden", ".dot", "100%", "犬 ñ", "a:b")]


@pytest.mark.skipif(os.name != "posix", reason="such names can't be made elsewhere")
def test_datasets_reads_it_whatever_the_names_are(tmp_path: Path) -> None:
    files = {f"{split}/{name}": jpeg(n) for n, split in enumerate(("train", "val", "test")) for name in NAMES}
    captions = {f"{name[:-4]}.txt": name.encode() for name in files}
    out = prepare.run(config(put(tmp_path / "source", files | captions), tmp_path / "data"))
    dataset = load_dataset("imagefolder", data_dir=str(out), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in dataset.items()} == dict.fromkeys(
        ("train", "validation", "test"), len(NAMES)
    )
    for ours, theirs in zip(SPLITS, ("train", "validation", "test")):
        assert {row["text"] for row in dataset[theirs]} == {f"{ours}/{name}" for name in NAMES}
        assert {row["captions"][0] for row in dataset[theirs]} == {f"{ours}/{name}" for name in NAMES}
        assert {row["image"].size for row in dataset[theirs]} == {(64, 48)}


def test_it_says_what_it_found_and_did(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert limner("prepare", "imagefolder", "--source", source, "--out", tmp_path / "data") == 0
    said = {line[:12].strip(): line[13:] for line in capsys.readouterr().out.splitlines()}
    counts = facts_of(tmp_path / "data")["counts"]
    assert said["found"] == "pictures with metadata"
    assert said["pictures"] == "{train} train, {val} val, {test} test, with 48 captions".format(**counts)
    assert said["split by"] == "a hash of seed 0 and file name (0.1 val, 0.1 test), as the source has no split lists"
    assert said["quarantined"] == "1 (1 not a picture)"
    assert said["report"] == str(tmp_path / "data" / "report.html")


def test_the_split_depends_on_the_names_and_the_seed_alone(source: Path, tmp_path: Path) -> None:
    def splits(out: Path) -> dict[str, str]:
        return {r.path.name: split for split in SPLITS for r in read_split(out, split)}

    whole = splits(prepare.run(config(source, tmp_path / "whole", **SHARES)))
    for n in range(0, COUNT, 2):
        (source / f"{n}.jpg").unlink()
    half = splits(prepare.run(config(source, tmp_path / "half", **SHARES)))
    assert half == {name: whole[name] for name in half}
    assert len(half) == COUNT / 2
    other = prepare.run(config(source, tmp_path / "other", **SHARES, seed=1))
    assert splits(other) != half
    alone = prepare.run(config(source, tmp_path / "alone", val_share=0, test_share=0))
    assert facts_of(alone)["counts"] == {"train": COUNT // 2, "val": 0, "test": 0}
    assert not (alone / "val").exists()


def test_webdataset_shards_become_the_same_dataset_as_a_folder(source: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-000.tar", "w") as archive:
        for n in range(COUNT):
            text = json.dumps({"captions": [f"Photograph {n} .", "A dog ."]}).encode()
            for name, data in ((f"{n}.jpg", jpeg(n)), (f"{n}.json", text)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    shards = prepare.run(config(tmp_path / "train-000.tar", tmp_path / "data", "webdataset"))
    folder = prepare.run(config(source, tmp_path / "data2", val_share=0, test_share=0))
    assert contents(shards) == contents(folder)
    assert facts_of(shards)["splits"] == {"by": "the source's train, val and test folders", "from_source": True}


def test_a_dataset_is_a_source_and_keeps_its_splits(source: Path, tmp_path: Path) -> None:
    first = prepare.run(config(source, tmp_path / "first", **SHARES))
    second = prepare.run(config(first, tmp_path / "second"))
    for split in SPLITS:
        for name in ("metadata.jsonl", *(r.path.name for r in read_split(first, split))):
            assert (second / split / name).read_bytes() == (first / split / name).read_bytes()
    assert facts_of(second)["quarantined"] == {}


def test_pictures_are_shrunk_when_asked(source: Path, tmp_path: Path) -> None:
    out = prepare.run(config(source, tmp_path / "data", size=24))
    assert {pixels_of(path).shape for path in out.glob("*/*.jpg")} == {(24, 32, 3)}


def test_pictures_without_captions_are_kept_when_asked(tmp_path: Path) -> None:
    source = put(tmp_path / "source", {f"{n}.jpg": jpeg(n) for n in range(3)})
    with pytest.raises(DataError, match=r"No picture in .* has a caption; add .* or use --uncaptioned"):
        prepare.run(config(source, tmp_path / "data"))
    out = prepare.run(config(source, tmp_path / "data", uncaptioned=True, val_share=0, test_share=0))
    assert [record.captions for record in read_split(out, "train")] == [()] * 3
    assert "Words a caption" not in (out / "report.html").read_text()


def test_masks_are_kept_when_asked(tmp_path: Path) -> None:
    masked = photo(1)
    masked.putalpha(Image.linear_gradient("L").resize(masked.size))
    files = {"a.png": encoded(masked, "PNG"), "b.jpg": jpeg(2)}
    source = put(tmp_path / "source", files | {f"{name[0]}.txt": b"A dog." for name in files})
    none = {"val_share": 0, "test_share": 0}
    kept = contents(prepare.run(config(source, tmp_path / "kept", keep_alpha=True, **none)))
    assert {name: data for name, (_, data) in kept.items()} == files
    assert set(contents(prepare.run(config(source, tmp_path / "data", **none)))) == {"a.jpg", "b.jpg"}


def test_a_dataset_of_an_older_version_had_its_settings_at_their_defaults(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare.run(config(source, tmp_path / "data", size=24))
    facts = facts_of(out)
    del facts["settings"]["keep_alpha"]
    (out / "dataset.json").write_text(json.dumps(facts))
    prepare.run(config(source, out, size=24))
    assert "Nothing to do" in capsys.readouterr().out
    for act in (prepare.run, prepare.plan):
        with pytest.raises(DataError, match="with other settings"):
            act(config(source, out, size=24, keep_alpha=True))


def test_exact_duplicates_are_dropped_when_asked_and_near_ones_counted(tmp_path: Path) -> None:
    files = {"train/a.png": encoded(photo(1), "PNG"), "train/b.bmp": encoded(photo(1), "BMP"), "test/c.jpg": jpeg(2)}
    files |= {"train/d.jpg": encoded(photo(2), quality=60), "val/e.jpg": jpeg(3)}
    source = put(tmp_path / "source", files | {f"{name[:-4]}.txt": b"A dog." for name in files})
    kept = facts_of(prepare.run(config(source, tmp_path / "kept")))
    assert kept["counts"] == {"train": 3, "val": 1, "test": 1}
    assert kept["duplicates"] == {"exact": 1, "dropped": False, "near_across_splits": 1}
    assert kept["remarks"] == {"same picture as another": 1}
    out = prepare.run(config(source, tmp_path / "dropped", drop_duplicates=True))
    assert facts_of(out)["counts"] == {"train": 2, "val": 1, "test": 1}
    assert facts_of(out)["quarantined"] == {"same picture as another": 1}
    assert {r.path.name for r in read_split(out, "train")} == {"a.png", "d.jpg"}
    assert {p.name for p in (out / "train").iterdir()} == {"a.png", "d.jpg", "metadata.jsonl"}


def test_the_plan_says_what_the_run_does_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    plan = prepare.plan(config(source, tmp_path / "data"))
    assert not (tmp_path / "data").exists()
    facts = facts_of(prepare.run(config(source, tmp_path / "data")))
    assert plan["pictures"] == sum(plan[split] for split in SPLITS) == sum(facts["counts"].values()) + 1
    assert plan["captions"] == sum(facts["captions"].values()) + 1, "the text named .jpg is found when it is decoded"
    assert plan["found"] == facts["source"]["layout"]
    assert plan["split by"] == facts["splits"]["by"]


# ---- again, and on after a stop


def test_a_finished_dataset_is_left_as_it_is(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare.run(config(source, tmp_path / "data"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    prepare.run(config(source, out, workers=1))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "Nothing to do" in capsys.readouterr().out


def test_a_dataset_that_was_moved_with_its_source_is_still_finished(source: Path, tmp_path: Path) -> None:
    prepare.run(config(source, tmp_path / "data")).rename(tmp_path / "moved")
    prepare.run(config(source.rename(tmp_path / "elsewhere"), tmp_path / "moved"))


@pytest.mark.parametrize("change", ["settings", "source", "a foreign dataset.json"])
def test_a_dataset_of_another_source_or_settings_is_left_alone(source: Path, tmp_path: Path, change: str) -> None:
    out = prepare.run(config(source, tmp_path / "data"))
    if change == "source":
        (source / "0.jpg").write_bytes(jpeg(99))
    elif change == "a foreign dataset.json":
        (out / "dataset.json").write_text("[]")
    before = everything(out)
    with pytest.raises(DataError, match="another source or with other settings; choose another --out"):
        prepare.run(config(source, out, size=24 if change == "settings" else None))
    assert everything(out) == before


@pytest.mark.parametrize("lost", ["train/0.jpg", "val", "train/metadata.jsonl"])
def test_a_dataset_that_lost_files_is_not_taken_for_finished(source: Path, tmp_path: Path, lost: str) -> None:
    out = prepare.run(config(source, tmp_path / "data"))
    lost_path = next(path for path in (out / lost, *out.glob("train/[0-9]*.jpg")) if path.exists())
    lost_path.rename(tmp_path / "lost")
    with pytest.raises(DataError, match="lost or gained files since it was made; delete"):
        prepare.run(config(source, out))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_ends_with_the_same_folder_as_one_never_killed(tmp_path: Path, workers: int) -> None:
    """kill -9 when a third of the pictures is done, then the same command."""
    count = 240
    source = photographs(tmp_path / "source", count, width=320, height=240)
    never_killed = prepare.run(config(source, tmp_path / "never"))
    out = tmp_path / "killed"
    arguments = ["prepare", "imagefolder", "--source", source, "--out", out, "--workers", workers]
    script = f"import sys; sys.argv[1:] = {list(map(str, arguments))!r}; from limner.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) as process:
        while process.poll() is None and lines_of(out / JOURNAL) < count / 3:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not (out / "dataset.json").exists(), "it was killed too late for this test"
    done = lines_of(out / JOURNAL) - 1
    assert 0 < done < count
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.jpg")}

    prepare.run(config(source, out))
    assert everything(out) == everything(never_killed)
    untouched = [path for path, modified in before.items() if path.stat().st_mtime_ns == modified]
    assert len(untouched) >= done, "what the journal names is not done again"


def lines_of(file: Path) -> int:
    """The whole lines of a file; 0 where there is none."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


STEPS: dict[str, Callable[[pytest.MonkeyPatch, Callable[..., Any]], None]] = {
    "the journal begins": lambda patch, fail: patch.setattr("limner.data.decode.write_text", fail),
    "pictures are written": lambda patch, fail: patch.setattr(Path, "write_bytes", fail),
    "metadata is written": lambda patch, fail: patch.setattr(prepare, "write_text", fail),
    "the report is written": lambda patch, fail: patch.setattr("limner.data.report.write_text", fail),
    "files are flushed": lambda patch, fail: patch.setattr("os.sync", fail),
    "dataset.json is written": lambda patch, fail: patch.setattr(prepare, "write_json", fail),
}
"""Where a run may be stopped, and how to make it fail there."""


@pytest.mark.skipif(not hasattr(os, "sync"), reason="needs os.sync")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("why", ["disk full", "interrupted"])
def test_a_run_that_is_stopped_anywhere_goes_on(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: str, why: str
) -> None:
    whole = prepare.run(config(source, tmp_path / "whole"))
    out = tmp_path / "data"

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device") if why == "disk full" else KeyboardInterrupt

    command = ("prepare", "imagefolder", "--source", source, "--out", out)
    with pytest.MonkeyPatch.context() as patch:
        STEPS[step](patch, fail)
        capsys.readouterr()
        assert limner(*command) == (2 if why == "disk full" else 130)
    if why == "disk full":
        assert one_sentence(capsys).startswith("limner: The disk is full")
    assert not (out / "dataset.json").exists()
    assert not list(tmp_path.rglob("*.partial"))
    assert limner(*command) == 0
    assert everything(out) == everything(whole)


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr beside the progress: one line that ends as sentences do."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Decoding")]
    assert len(lines) == 1, lines
    assert lines[0].endswith((".", "?"))
    return lines[0]


def test_leftovers_of_a_kill_while_a_file_was_written_are_removed(source: Path, tmp_path: Path) -> None:
    whole = prepare.run(config(source, tmp_path / "whole"))
    out = put(tmp_path / "data", {".progress.jsonl.1.partial": b"half"})
    prepare.run(config(source, out))
    assert everything(out) == everything(whole)
    (out / "dataset.json").unlink()
    put(out, {JOURNAL: b"", "train/.0.jpg.1.partial": b"half", ".report.html.1.partial": b"half"})
    prepare.run(config(source, out))
    assert everything(out) == everything(whole)
    put(out, {JOURNAL: b"", ".dataset.json.1.partial": b"half"})  # killed after the last step but one
    prepare.run(config(source, out))
    assert not (out / JOURNAL).exists()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX locks")
def test_a_second_process_does_not_work_in_the_same_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    arguments = ["prepare", "imagefolder", "--source", str(source), "--out", str(out)]
    script = f"import sys; sys.argv[1:] = {arguments!r}; from limner.cli import main; main()"
    with alone(out):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert f"Another process is at work in {out}; let it end" in done.stderr
    assert [path.name for path in out.iterdir()] == [".lock"]
    prepare.run(config(source, out))


def test_an_unfinished_run_is_not_continued_with_other_settings(source: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.sync", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare.run(config(source, tmp_path / "data"))
    for act in (prepare.run, prepare.plan):
        with pytest.raises(DataError, match="unfinished run with another source or settings"):
            act(config(source, tmp_path / "data", size=24))


# ---- wrong input: exit code 2, one sentence, and nothing is left


def refused(capsys: pytest.CaptureFixture[str], kind: str, source: Path, out: Path, *more: str) -> str:
    """What the command line says when it refuses; that --out is as it was is asserted."""
    before = Counter(out.parent.rglob("*"))
    assert limner("prepare", kind, "--source", source, "--out", out, *more) == 2
    assert Counter(out.parent.rglob("*")) == before
    return one_sentence(capsys)


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("kind", "files", "sentence"),
    [
        ("flickr8k", None, "does not exist; give the folder or archive"),
        ("imagefolder", None, "does not exist"),
        ("webdataset", None, "does not exist"),
        ("flickr8k", {"a.jpg": jpeg()}, "none of Flickr8k's layouts"),
        ("imagefolder", {"notes.md": b"x"}, "holds no pictures"),
        ("imagefolder", {"a.jpg": jpeg()}, "has a caption; add metadata.jsonl"),
        ("webdataset", {"a.jpg": jpeg()}, "holds no .tar shards"),
        ("imagefolder", {}, "holds no pictures"),
        ("imagefolder", {"a.jpg": jpeg(), "metadata.csv": b"nonsense"}, "has no header"),
    ],
    ids=range(9),
)
def test_a_wrong_source_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    files: dict[str, bytes] | None,
    sentence: str,
    dry_run: list[str],
) -> None:
    source = tmp_path / "source"
    if files is not None:
        source.mkdir()
        put(source, files)
    assert sentence in refused(capsys, kind, source, tmp_path / "data", *dry_run)


def test_a_source_without_one_usable_picture_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = put(tmp_path / "source", {"a.jpg": b"text", "a.txt": b"A dog.", "b.jpg": jpeg()[:400], "b.txt": b"A dog."})
    put(source, {"c.jpg": b"more text", "c.txt": b"A cat."})
    assert "None of the 3 pictures in" in (said := refused(capsys, "imagefolder", source, tmp_path / "data"))
    assert "(mostly: not a picture)" in said


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_wrong_out_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry_run: list[str]
) -> None:
    put(tmp_path, {"file": b"x", "photos/mine.jpg": b"x"})
    for out, sentence in {
        tmp_path / "file": "is a file; choose another --out",
        tmp_path / "photos": "is not empty and not a dataset that Limner began",
        source / "data": "lies inside the source",
        source: "lies inside the source",
    }.items():
        assert sentence in refused(capsys, "imagefolder", source, out, *dry_run)


def test_an_out_below_a_file_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, {"file": b"x"})
    assert "A file stands where a folder is needed" in refused(
        capsys, "imagefolder", source, tmp_path / "file" / "data"
    )


@pytest.mark.parametrize("what", ["folder", "zip"])
def test_a_source_that_must_not_be_read_is_refused(capsys: pytest.CaptureFixture[str], what: str) -> None:
    with no_special_rights() as folder:
        source = photographs(folder / "source", 1)
        if what == "zip":
            source = Path(shutil.make_archive(str(folder / "photographs"), "zip", source))
        source.chmod(0)
        assert f"no right to read {source}" in refused(capsys, "imagefolder", source, folder / "data")


def test_a_file_that_must_not_be_read_is_named_and_the_rest_prepared() -> None:
    with no_special_rights() as folder:
        source = photographs(folder / "source", 3)
        (source / "1.jpg").chmod(0)
        out = prepare.run(config(source, folder / "data", val_share=0, test_share=0))
        assert {record.path.name for record in read_split(out, "train")} == {"0.jpg", "2.jpg"}
        assert facts_of(out)["quarantined"] == {"can't be read": 1, "not a picture": 1}


def test_an_out_that_must_not_be_written_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with no_special_rights() as folder:
        source = photographs(folder / "source", 3)
        (folder / "locked").mkdir(mode=0o500)
        assert "There is no right to read or write" in refused(
            capsys, "imagefolder", source, folder / "locked" / "data"
        )


def test_shares_that_leave_nothing_to_train_on_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave nothing to train on"):
        config(source, tmp_path / "data", val_share=0.5, test_share=0.5)
