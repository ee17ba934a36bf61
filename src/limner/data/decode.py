"""Decode, check and write all pictures once, in several processes; a journal lets a killed run go on.

A picture is written under a hidden name and renamed, and its line in the journal follows; so what the journal
names is whole, and the size it states is compared before it is believed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import wait as wait_for_process
from pathlib import Path, PurePosixPath
from typing import Any

from limner.artifacts import PARTIAL, write_text
from limner.data.archives import Entry, read
from limner.data.checks import Limits, examine
from limner.data.dataset import Split
from limner.data.findings import Rejected, json_line
from limner.data.sources import Picture
from limner.errors import DataError, RunError

JOURNAL = ".progress.jsonl"
CHUNK = 16  # pictures a message to a worker
INLINE = 64  # so few pictures take less time than starting processes


@dataclass(frozen=True)
class Job:
    """A picture to decode, and where it goes: `stem` is the name it gets, without the suffix its content decides."""

    name: str
    entry: Entry
    split: Split
    stem: str


@dataclass(frozen=True)
class Outcome:
    """What became of a job. `file` is empty where the picture was rejected, and then there is a `reason`."""

    name: str
    file: str = ""
    size: int = 0
    width: int = 0
    height: int = 0
    pixels: str = ""
    phash: int = 0
    changes: tuple[str, ...] = ()
    reason: str = ""
    detail: str = ""


def plan_jobs(pictures: Sequence[Picture], splits: Sequence[Split]) -> list[Job]:
    """Give each picture a name of its own, flat, and safe on every system; the same names in every run."""
    taken: set[str] = set()
    jobs = []
    for picture, split in zip(pictures, splits):
        stem = safe_stem(picture.name)
        if stem.casefold() in taken:
            stem += "-" + hashlib.sha256(picture.name.encode("utf-8", "replace")).hexdigest()[:8]
        while stem.casefold() in taken:
            stem += "x"
        taken.add(stem.casefold())
        jobs.append(Job(picture.name, picture.entry, split, stem))
    return jobs


def safe_stem(name: str) -> str:
    """The base name without its suffix, with letters of any language, and nothing that file systems mind."""
    stem = PurePosixPath(name.rsplit("/", 1)[-1]).stem
    stem = re.sub(r'[\\/:*?"<>|%\ufffd]|[^\S ]', "_", stem)
    stem = "".join(c if c.isprintable() else "_" for c in stem).strip(" ._")
    return stem.encode()[:150].decode("utf-8", "ignore") or "picture"


def decode_one(job: Job, out: Path, limits: Limits) -> Outcome:
    """Read, check and write one picture. Raises OSError where it can't be written."""
    try:
        checked = examine(read(job.entry), job.name, limits)
    except Rejected as error:
        return Outcome(job.name, reason=error.reason, detail=error.detail)
    file = f"{job.split}/{job.stem}{checked.suffix}"
    target = out / file
    hidden = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
    try:
        hidden.write_bytes(checked.data)  # flushed to disk with all others, before dataset.json says they are there
        hidden.replace(target)
    finally:
        hidden.unlink(missing_ok=True)
    facts = (checked.width, checked.height, checked.pixels, checked.phash, checked.changes)
    return Outcome(job.name, file, len(checked.data), *facts)


def decode_all(jobs: Sequence[Job], out: Path, limits: Limits, workers: int) -> Iterator[Outcome]:
    """What became of each job, in the order in which they are done.

    Raises OSError where `out` can't be written, RunError where a process died.
    """
    for split in {job.split for job in jobs}:
        (out / split).mkdir(exist_ok=True)
    work = partial(decode_one, out=out, limits=limits)
    if workers == 1 or len(jobs) <= INLINE:
        yield from map(work, jobs)
        return
    chunks = iter([jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        try:
            waiting: set[Future[list[Outcome]]] = set()
            waiting |= {pool.submit(_decode_chunk, chunk, work) for chunk in islice(chunks, 3 * workers)}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                waiting |= {pool.submit(_decode_chunk, chunk, work) for chunk in islice(chunks, len(done))}
                for future in done:
                    yield from future.result()
        except BrokenProcessPool:
            advice = "run the same command again to go on, with --workers 1 if memory is short"
            raise RunError(f"A process that decodes pictures died; {advice}.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _decode_chunk(jobs: Sequence[Job], work: partial[Outcome]) -> list[Outcome]:
    return [work(job) for job in jobs]


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it is killed (a pool's workers would wait for ever)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for_process([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class Journal:
    """The outcomes so far, in `.progress.jsonl`: a first line that says what they are of, then one a line."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.path = out / JOURNAL
        self._out = out
        self._identity = identity

    def outcomes(self) -> dict[str, Outcome]:
        """Those whose files are still there. Raises DataError where they are of another source or setting."""
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        if not lines or not (first := _parsed(lines[0])):
            return {}  # killed while the first line was written
        if first != self._identity:
            raise DataError(
                f"{self._out} holds an unfinished run with another source or settings; "
                "repeat that command to finish it, delete the folder, or choose another --out."
            )
        found = {}
        for line in lines[1:]:
            if row := _parsed(line):  # the last line may be cut off
                outcome = Outcome(**{**row, "changes": tuple(row.get("changes", ()))})
                if outcome.reason or self._is_there(outcome):
                    found[outcome.name] = outcome
        return found

    def record(self, outcomes: Iterator[Outcome], known: Sequence[Outcome]) -> Iterator[Outcome]:
        """Pass `outcomes` on and note each; `known` are those that an earlier run noted."""
        write_text(self.path, "".join(map(json_line, [self._identity, *map(asdict, known)])))
        with self.path.open("a", encoding="utf-8") as file:
            for outcome in outcomes:
                file.write(json_line(asdict(outcome)))
                file.flush()
                yield outcome

    def _is_there(self, outcome: Outcome) -> bool:
        file = self._out / outcome.file
        return file.is_file() and file.stat().st_size == outcome.size


def _parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
