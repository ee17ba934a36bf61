"""Folders on disk: what is written is whole or not there, and hashes and manifests say what they should."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from limner import artifacts
from limner.artifacts import (
    PARTIAL,
    Run,
    atomic_file,
    atomic_folder,
    identity,
    is_finished,
    read_json,
    sha256,
    sha256_folder,
)
from limner.config import EncodeConfig, TrainVaeConfig
from limner.errors import RunError
from limner.settings import resolve

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and devices")


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its text."""
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def put(folder: Path, files: dict[str, str]) -> Path:
    """Write files by name, in the order given."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


# ---- atomic_file


def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file.txt"
    for text in ("old", "new"):
        with atomic_file(file) as partial:
            partial.write_text(text)
    assert tree(tmp_path) == {"a/b/file.txt": "new"}


def test_two_threads_may_write_one_file(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file.txt") as one, atomic_file(tmp_path / "file.txt") as other:
        one.write_text("one")
        other.write_text("other")
    assert tree(tmp_path) == {"file.txt": "one"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: BaseException | type[BaseException]) -> None:
    put(tmp_path, {"file.txt": "old"})
    with (
        pytest.raises(error if isinstance(error, type) else type(error)),
        atomic_file(tmp_path / "file.txt") as partial,
    ):
        partial.write_text("half")
        raise error
    assert tree(tmp_path) == {"file.txt": "old"}


def test_an_error_leaves_no_file_where_there_was_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), atomic_file(tmp_path / "file.txt") as partial:
        partial.write_text("half")
        raise ValueError("x")
    assert tree(tmp_path) == {}


def no_space(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_at_the_flush_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"settings.json": "{}"})
    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        artifacts.write_json(tmp_path / "settings.json", {"a": 1})
    assert tree(tmp_path) == {"settings.json": "{}"}


@posix
def test_a_write_that_fails_for_want_of_space_leaves_the_old_file(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    put(tmp_path, {"file.txt": "old"})
    with pytest.raises(OSError, match="No space"), atomic_file(tmp_path / "file.txt") as partial:
        partial.symlink_to(full)
        partial.write_text("new")
    assert tree(tmp_path) == {"file.txt": "old"}


# ---- atomic_folder


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with the swap in one step where the system has it, once without."""
    if not request.param:
        monkeypatch.setattr(artifacts, "_exchange", lambda one, other: False)


@pytest.mark.usefixtures("_both_ways")
def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for files in ({"a": "old", "sub/b": "old"}, {"a": "new", "sub/c": "new"}):
        with atomic_folder(tmp_path / "runs" / "model") as partial:
            put(partial, files)
    assert tree(tmp_path) == {"runs/model/a": "new", "runs/model/sub/c": "new"}
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["model"]


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    put(tmp_path, {"model/a": "old"})
    with pytest.raises(error), atomic_folder(tmp_path / "model") as partial:
        put(partial, {"a": "half"})
        raise error
    assert tree(tmp_path) == {"model/a": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_full_at_the_flush_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"model/a": "old"})
    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"), atomic_folder(tmp_path / "model") as partial:
        put(partial, {"a": "new"})
    assert tree(tmp_path) == {"model/a": "old"}


@pytest.mark.usefixtures("_both_ways")
def test_of_two_at_once_the_later_stays_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as one, atomic_folder(tmp_path / "model") as other:
        put(one, {"a": "one"})
        put(other, {"b": "other"})
    assert tree(tmp_path) == {"model/a": "one"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_in_the_place_of_a_folder_stays(tmp_path: Path) -> None:
    put(tmp_path, {"model": "a file"})
    with pytest.raises(NotADirectoryError), atomic_folder(tmp_path / "model") as partial:
        put(partial, {"a": "new"})
    assert tree(tmp_path) == {"model": "a file"}


@pytest.mark.parametrize("name", [".", ".."])
def test_the_folder_that_one_is_in_or_the_one_above_will_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with atomic_folder(Path(name)) as partial:
        put(partial, {"file": "new"})
    assert tree(tmp_path) == {"a/b/file" if name == "." else "a/file": "new"}


# ---- killed while writing

WRITER = """
import sys
from pathlib import Path
from limner.artifacts import atomic_file, atomic_folder

root, text = Path(sys.argv[1]), "x" * 1_000_000
for number in range(1_000_000):
    with atomic_file(root / "file") as partial:
        partial.write_text(f"{number}" + text)
    with atomic_folder(root / "folder") as partial:
        for name in "ab":
            (partial / name).write_text(f"{number}" + text)
    if number == 0:
        print("ready", flush=True)
"""


@posix
@pytest.mark.parametrize("delay", [random.Random(k).uniform(0, 0.1) for k in range(5)], ids=lambda s: f"{s:.3f}s")
def test_a_killed_writer_leaves_what_is_whole(tmp_path: Path, delay: float) -> None:
    """kill -9 at any moment: file and folder hold one writing's content, all of it."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    file = (tmp_path / "file").read_text()
    assert file == file.rstrip("x") + "x" * 1_000_000
    a, b = (tmp_path / "folder" / name for name in "ab")
    assert a.read_text() == b.read_text()
    assert a.read_text().endswith("x" * 1_000_000)
    assert {p.name for p in tmp_path.iterdir() if PARTIAL not in p.name} == {"file", "folder"}
    assert PARTIAL not in "".join(sha256_folder(tmp_path))


# ---- hashes


def test_hashes_are_those_of_the_contents(tmp_path: Path) -> None:
    put(tmp_path, {"b/x.bin": "one", "a.bin": "two", ".c.1.partial": "half", ".d.1.partial/e.bin": "half"})
    assert sha256(tmp_path / "a.bin") == hashlib.sha256(b"two").hexdigest()
    assert list(sha256_folder(tmp_path).items()) == [
        ("a.bin", hashlib.sha256(b"two").hexdigest()),
        ("b/x.bin", hashlib.sha256(b"one").hexdigest()),
    ]


def test_identity_does_not_depend_on_order_or_place_and_sees_only_weights(tmp_path: Path) -> None:
    weights = {"unet/w.safetensors": "1", "vae/w.safetensors": "2", "a.safetensors": "3"}
    one = put(tmp_path / "one", weights)
    other = put(tmp_path / "other", {**dict(reversed(weights.items())), "README.md": "more"})
    assert identity(one) == identity(other)
    put(other, {"vae/w.safetensors": "1", "unet/w.safetensors": "2"})
    assert identity(one) != identity(other), "the same files under exchanged names are another model"


# ---- JSON


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"ä": [1, 2.5, None, True], "nested": {"a": "b\n"}}
    artifacts.write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


def test_json_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"x\.json is missing"):
        read_json(tmp_path / "x.json")
    for content in (b"{", b"", b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(RunError, match=r"x\.json is not valid JSON") as caught:
            read_json(tmp_path / "x.json")
        assert "\n" not in str(caught.value)


# ---- run folders


def vae(**settings: object) -> TrainVaeConfig:
    """A configuration of a training."""
    return resolve(TrainVaeConfig, {"data": "d", "out": "r", **settings})


PARENTS = {"data": "0" * 64, "vae": "1" * 64}


def test_a_run_is_opened_again_with_the_same_settings(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "r", vae(), PARENTS)
    put(run.checkpoints, {"1/state.json": "{}"})
    assert Run.open(tmp_path / "r", vae(), PARENTS) == run
    assert (run.checkpoints / "1" / "state.json").exists()
    assert resolve(TrainVaeConfig, {}, file=run.folder / "config.json") == vae()
    assert run.manifest == {"parents": PARENTS}
    assert not run.finished


def test_a_run_is_not_opened_with_other_settings_and_they_are_named(tmp_path: Path) -> None:
    Run.open(tmp_path / "r", vae(), PARENTS)
    before = tree(tmp_path)
    with pytest.raises(RunError, match=r"other settings \(channels, lr\)"):
        Run.open(tmp_path / "r", vae(lr=0.5, channels=(8, 8), workers=3), PARENTS)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("parents", "named"),
    [
        ({**PARENTS, "vae": "2" * 64}, "vae"),
        ({"data": "3" * 64, "vae": "2" * 64}, "data and vae"),
        ({"data": "0" * 64}, "vae"),
        ({**PARENTS, "clip": "4" * 64}, "clip"),
    ],
)
def test_a_run_is_not_opened_with_other_parents_and_they_are_named(
    tmp_path: Path, parents: dict[str, str], named: str, finished: bool
) -> None:
    run = Run.open(tmp_path / "r", vae(), PARENTS)
    if finished:
        run.finish(started=time.time())
    before = tree(tmp_path)
    with pytest.raises(RunError, match=f"made from other contents of {named} than"):
        Run.open(tmp_path / "r", vae(workers=3), parents)
    assert tree(tmp_path) == before


def test_a_run_is_not_opened_by_another_stage(tmp_path: Path) -> None:
    Run.open(tmp_path / "r", vae(), PARENTS)
    encode = resolve(EncodeConfig, {"data": "d", "out": "r", "vae": "v", "clip": "c"})
    with pytest.raises(RunError, match="other settings"):
        Run.open(tmp_path / "r", encode, PARENTS)


def test_settings_that_do_not_change_the_result_may_differ_and_are_kept_once_work_begins(tmp_path: Path) -> None:
    first = Run.open(tmp_path / "r", vae(), PARENTS)
    before = tree(tmp_path)
    more = vae(workers=3, images=200_000)
    assert Run.open(tmp_path / "r", more, PARENTS) == first
    assert tree(tmp_path) == before
    with first.work(more):
        assert read_json(tmp_path / "r" / "config.json")["images"] == 200_000


def test_what_a_run_of_an_older_version_does_not_say_was_as_the_default_is(tmp_path: Path) -> None:
    Run.open(tmp_path / "r", vae(), PARENTS)
    file = tmp_path / "r" / "config.json"
    known = {name: value for name, value in read_json(file).items() if name not in ("layers", "result", "patience")}
    file.write_text(json.dumps(known))
    with pytest.raises(RunError, match=r"other settings \(layers\)"):
        Run.open(tmp_path / "r", vae(layers=2), PARENTS)
    assert read_json(file) == known
    with Run.open(tmp_path / "r", vae(), PARENTS).work(vae()):
        assert read_json(file)["layers"] == 1


def test_a_run_may_be_moved(tmp_path: Path) -> None:
    Run.open(tmp_path / "r", vae(out=tmp_path / "r"), PARENTS)
    (tmp_path / "r").rename(tmp_path / "s")
    Run.open(tmp_path / "s", vae(out=tmp_path / "s"), PARENTS)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path, {"photos/a.jpg": "", "notes": "a file", "model/manifest.json": "{}"})
    before = tree(tmp_path)
    for name in ("photos", "notes", "model"):
        with pytest.raises(RunError, match="not a run folder"):
            Run.open(tmp_path / name, vae(), PARENTS)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("left", [{}, {".config.json.1.partial": "{", ".lock": ""}], ids=["empty", "what a kill left"])
def test_an_empty_folder_will_do(tmp_path: Path, left: dict[str, str]) -> None:
    put(tmp_path, left)
    Run.open(tmp_path, vae(), PARENTS)
    assert set(tree(tmp_path)) - set(left) == {"config.json", "manifest.json"}


def test_a_run_killed_while_it_was_opened_is_opened(tmp_path: Path) -> None:
    Run.open(tmp_path, vae(), PARENTS)
    (tmp_path / "manifest.json").unlink()
    assert Run.open(tmp_path, vae(), PARENTS).manifest == {"parents": PARENTS}


def test_what_killed_processes_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    run = Run.open(tmp_path, vae(), PARENTS)
    before = tree(tmp_path)
    put(tmp_path, {"cache/.moments.npy.1.partial": "half", ".model.2.partial/vae/.x.2.partial": "half"})
    with run.work(vae()):
        assert {n: t for n, t in tree(tmp_path).items() if n != ".lock"} == before
        assert not (tmp_path / ".model.2.partial").exists()


def test_what_was_moved_away_for_what_never_came_is_put_back(tmp_path: Path) -> None:
    """Where two folders can't change places in one step, a kill may come between the two."""
    run = Run.open(tmp_path, vae(), PARENTS)
    put(tmp_path, {".model.old.partial/vae/x": "old", "cache/b": "new", "cache/.b.old.partial/x": "old"})
    with run.work(vae()):
        assert tree(tmp_path).items() >= {"model/vae/x": "old", "cache/b": "new"}.items()
        assert not list(tmp_path.rglob("*.partial"))


WORKER = """
import sys, time
from pathlib import Path
from limner.artifacts import Run
from limner.config import TrainVaeConfig

folder = Path(sys.argv[1])
with Run(folder).work(TrainVaeConfig(data="d", out="r")):
    print("ready", flush=True)
    time.sleep(600)
"""


@posix
def test_two_processes_do_not_work_in_one_folder_and_a_kill_lets_go_of_it(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "r", vae(), PARENTS)
    with subprocess.Popen([sys.executable, "-c", WORKER, run.folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = tree(tmp_path)
        with pytest.raises(RunError, match=r"^Another process is at work in .*r; .*\.$"), run.work(vae(workers=3)):
            pass
        assert tree(tmp_path) == before
        process.send_signal(signal.SIGKILL)
    for _ in range(2):  # and so does the end of the work
        with run.work(vae()):
            pass


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    Run.open(tmp_path, vae(), PARENTS)
    put(tmp_path, {name: "{"})
    with pytest.raises(RunError, match=rf"{name} is not valid JSON"):
        Run.open(tmp_path, vae(), PARENTS)


def test_a_run_is_finished_when_its_manifest_says_so(tmp_path: Path) -> None:
    run = Run.open(tmp_path, vae(), PARENTS)
    assert not run.finished
    run.finish(started=time.time() - 2, images=10)
    assert run.finished
    assert is_finished(tmp_path)
    assert not is_finished(tmp_path / "missing")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["parents"] == PARENTS
    assert manifest["images"] == 10
    assert manifest["seconds"] >= 2
    assert {"limner", "finished", "hardware"} <= set(manifest)
    assert Run.open(tmp_path, vae(images=200_000), PARENTS).manifest == manifest
