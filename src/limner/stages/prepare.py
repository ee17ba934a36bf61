"""`limner prepare`: from a source archive or folder to a dataset folder.

List and parse the source, decode every picture once, then write what was found. `dataset.json` comes last and says
that the rest is whole; until it is there, the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from limner.artifacts import LOCK, PARTIAL, alone, is_empty, read_json, write_json, write_text
from limner.config import PrepareConfig
from limner.data.archives import digests
from limner.data.checks import Limits
from limner.data.dataset import SPLITS, Split
from limner.data.decode import JOURNAL, Job, Journal, Outcome, decode_all, plan_jobs
from limner.data.duplicates import Hashed, near_pairs, same_pixels
from limner.data.findings import Finding, json_line
from limner.data.flickr8k import read_flickr8k
from limner.data.folders import read_imagefolder, read_webdataset
from limner.data.report import Item, write_report
from limner.data.sources import Picture, Source, prepare_captions, split_of
from limner.errors import DataError
from limner.progress import progress

ADAPTERS: dict[str, Callable[[Path], Source]] = {
    "flickr8k": read_flickr8k,
    "imagefolder": read_imagefolder,
    "webdataset": read_webdataset,
}
NOT_OF_THE_RESULT = {"out", "source", "workers"}  # settings; the source counts by its content
LISTED_FILES = 10  # of a source, in dataset.json; of more only the hash over all
PICTURES_A_SECOND = 250  # one core, photographs of 224 to 500 pixels; for the estimate of --dry-run alone


@dataclass(frozen=True)
class Survey:
    """What a source holds before any picture is decoded."""

    source: Source
    pictures: list[Picture]
    splits: list[Split]
    findings: list[Finding]


def run(config: PrepareConfig) -> Path:
    """Make the dataset folder, finish it where a run was stopped, or leave a finished one as it is. -> the folder.

    Raises DataError: a source of another kind or without a usable picture, or a folder that holds something else;
    RunError where another process is at work in it, and OSError where it can't be written.
    """
    _require("imagehash", "jinja2")
    with _readable(config.source):
        survey = _survey(config)
        identity, files = _identity(config)
    if _is_finished(config, identity):
        (config.out / JOURNAL).unlink(missing_ok=True)  # killed after the last step but this
        print(f"Nothing to do: {config.out} is finished, with this source and these settings.")
        return config.out
    jobs = plan_jobs(survey.pictures, survey.splits)
    with alone(config.out):
        outcomes = _decode(config, jobs, identity)
        facts = _finish(config, survey, [outcomes[job.name] for job in jobs], identity, files)
    _summarise(config.out, facts)
    return config.out


def plan(config: PrepareConfig) -> dict[str, Any]:
    """What `run` would do, without decoding a picture. Raises DataError as `run` does."""
    _require("imagehash", "jinja2")
    with _readable(config.source):
        survey = _survey(config)
        identity, _ = _identity(config)
    pictures = len(survey.pictures)
    done = pictures if _is_finished(config, identity) else len(Journal(config.out, identity).outcomes())
    workers = _workers(config)
    seconds = (pictures - done) / (PICTURES_A_SECOND * workers)
    return {
        "found": survey.source.layout,
        "pictures": pictures,
        "done already": done,
        **{split: survey.splits.count(split) for split in SPLITS},
        "captions": sum(len(picture.captions) for picture in survey.pictures),
        "split by": _split_by(config, survey.source),
        "quarantined undecoded": sum(not finding.kept for finding in survey.findings),
        "disk": f"at most {sum(picture.entry.size for picture in survey.pictures) / 1e6:.0f} MB if kept as they are",
        "time": f"about {max(seconds, 1):.0f} s with {workers} processes",
        "out": config.out,
    }


def _identity(config: PrepareConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """What tells a dataset from others, settings and source; and the hash of each file of the source."""
    total, files = digests(config.source)
    settings = json.loads(config.model_dump_json(exclude=NOT_OF_THE_RESULT))
    return {"settings": settings, "sha256": total}, files


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise DataError(f"`limner prepare` needs {' and '.join(missing)}; install with: pip install 'limner[train]'.")


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise DataError(f"There is no right to read {error.filename or source}; change that first.") from None


def _survey(config: PrepareConfig) -> Survey:
    source = ADAPTERS[config.kind](config.source)
    pictures, findings = prepare_captions(source, uncaptioned=config.uncaptioned)
    if not pictures:
        raise DataError(
            f"No picture in {config.source} has a caption; add metadata.jsonl or .txt files beside them, "
            "or use --uncaptioned."
        )
    splits = [p.split or split_of(p.name, config.seed, config.val_share, config.test_share) for p in pictures]
    return Survey(source, pictures, splits, source.findings + findings)


def _split_by(config: PrepareConfig, source: Source) -> str:
    shares = f"{config.val_share:g} val, {config.test_share:g} test"
    return source.split_by or f"a hash of seed {config.seed} and file name ({shares}), as the source has no split lists"


def _workers(config: PrepareConfig) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return config.workers or cores or 1


def _is_finished(config: PrepareConfig, identity: dict[str, Any]) -> bool:
    """Whether nothing is left to do. Raises DataError where the folder is not this source's with these settings."""
    out = config.out
    _refuse_wrong_out(config)
    if not (out / "dataset.json").exists():
        return False
    facts = read_json(out / "dataset.json")
    try:
        # What a dataset of an older version doesn't say was as the default is
        settings = {name: PrepareConfig.model_fields[name].default for name in identity["settings"]} | facts["settings"]
        found = {"settings": settings, "sha256": facts["source"]["sha256"]}
    except (KeyError, TypeError):
        found = {}
    if found != identity:
        raise DataError(f"{out} was made from another source or with other settings; choose another --out.")
    for split, count in facts["counts"].items():
        if count and len(list((out / split).glob("[!.]*"))) != count + 1:  # the pictures and metadata.jsonl
            raise DataError(f"{out / split} has lost or gained files since it was made; delete {out} and run again.")
    return True


def _refuse_wrong_out(config: PrepareConfig) -> None:
    out = config.out
    if out.is_file():
        raise DataError(f"{out} is a file; choose another --out.")
    if config.source.is_dir() and out.resolve().is_relative_to(config.source.resolve()):
        raise DataError(f"--out {out} lies inside the source; choose a folder outside of it.")
    ours = (out / "dataset.json").exists() or (out / JOURNAL).exists()
    if out.is_dir() and not ours and not is_empty(out):
        raise DataError(f"{out} is not empty and not a dataset that Limner began; choose another --out.")


def _decode(config: PrepareConfig, jobs: Sequence[Job], identity: dict[str, Any]) -> dict[str, Outcome]:
    """The outcome of every job by name; those that an earlier run noted are not done again."""
    journal = Journal(config.out, identity)
    outcomes = journal.outcomes()
    left = [job for job in jobs if job.name not in outcomes]
    limits = Limits(config.size, config.min_side, config.max_pixels, config.keep_alpha)
    with progress("Decoding", len(jobs), done=len(jobs) - len(left)) as advance:
        fresh = decode_all(left, config.out, limits, _workers(config))
        for outcome in journal.record(fresh, list(outcomes.values())):
            outcomes[outcome.name] = outcome
            advance(1)
    return outcomes


def _finish(
    config: PrepareConfig, survey: Survey, outcomes: Sequence[Outcome], identity: dict[str, Any], files: dict[str, str]
) -> dict[str, Any]:
    """Write everything but the pictures; `dataset.json`, whose content is returned, last."""
    out = config.out
    findings = list(survey.findings)
    items = []
    for picture, outcome in zip(survey.pictures, outcomes):
        if outcome.reason:
            findings.append(Finding(outcome.name, outcome.reason, outcome.detail))
        else:
            items.append(Item(outcome, picture.captions))
    if not items:
        (out / JOURNAL).unlink()
        (out / LOCK).unlink(missing_ok=True)  # there is none on Windows
        _clear_leftovers(out)
        reason = Counter(outcome.reason for outcome in outcomes).most_common(1)[0][0]
        raise DataError(f"None of the {len(outcomes)} pictures in {config.source} can be used (mostly: {reason}).")
    repeated = same_pixels([_hashed(item) for item in items])
    for file, first in repeated.items():
        findings.append(Finding(file, "same picture as another", first, kept=not config.drop_duplicates))
    if config.drop_duplicates:
        for file in repeated:
            (out / file).unlink()
        items = [item for item in items if item.outcome.file not in repeated]
    near, pairs = near_pairs([_hashed(item) for item in items])
    findings.sort(key=lambda finding: (finding.kept, finding.reason, finding.file))
    facts = _facts(config, survey, items, findings, identity, files)
    facts["duplicates"] = {"exact": len(repeated), "dropped": config.drop_duplicates, "near_across_splits": near}
    for split in SPLITS:
        if rows := [_row(item) for item in items if item.split == split]:
            write_text(out / split / "metadata.jsonl", "".join(map(json_line, rows)))
    write_text(out / "quarantine.jsonl", "".join(json_line(finding.row()) for finding in findings))
    write_report(out, facts, items, findings, pairs)
    _clear_leftovers(out)
    if hasattr(os, "sync"):
        os.sync()  # the pictures, all at once: thousands of fsync calls would take minutes on a hard disk
    write_json(out / "dataset.json", facts)
    (out / JOURNAL).unlink(missing_ok=True)  # another process may have found all finished and done so
    return facts


def _facts(
    config: PrepareConfig,
    survey: Survey,
    items: Sequence[Item],
    findings: Sequence[Finding],
    identity: dict[str, Any],
    files: dict[str, str],
) -> dict[str, Any]:
    from limner import __version__

    split_by = _split_by(config, survey.source)
    listed = {"sha256_of": files} if len(files) <= LISTED_FILES else {"files": len(files)}
    return {
        "name": survey.source.name,
        "licence": survey.source.licence,
        "limner": __version__,
        "counts": {split: sum(item.split == split for item in items) for split in SPLITS},
        "captions": {split: sum(len(i.captions) for i in items if i.split == split) for split in SPLITS},
        "splits": {"by": split_by, "from_source": survey.source.split_by is not None},
        "source": {"layout": survey.source.layout, "sha256": identity["sha256"], **listed},
        "quarantined": dict(Counter(finding.reason for finding in findings if not finding.kept)),
        "remarks": dict(Counter(finding.reason for finding in findings if finding.kept)),
        "settings": identity["settings"],
    }


def _hashed(item: Item) -> Hashed:
    return Hashed(item.outcome.file, item.outcome.pixels, item.outcome.phash)


def _row(item: Item) -> dict[str, Any]:
    """A line of metadata.jsonl, as `datasets` and the Diffusers example scripts read it."""
    name = item.outcome.file.split("/", 1)[1]
    return {"file_name": name, "captions": item.captions, "text": item.captions[0] if item.captions else ""}


def _clear_leftovers(out: Path) -> None:
    """Remove what a killed run was writing, and folders in which nothing is left."""
    for folder in (*(out / split for split in SPLITS), out):
        for path in folder.glob(f".*{PARTIAL}"):
            path.unlink()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _summarise(out: Path, facts: dict[str, Any]) -> None:
    duplicates = facts["duplicates"]
    quarantined = ", ".join(f"{n} {reason}" for reason, n in facts["quarantined"].items())
    pictures = ", ".join(f"{facts['counts'][split]:,} {split}" for split in SPLITS)
    exact = f"{duplicates['exact']} exact ({'dropped' if duplicates['dropped'] else 'kept'})"
    for label, value in (
        ("found", facts["source"]["layout"]),
        ("pictures", f"{pictures}, with {sum(facts['captions'].values()):,} captions"),
        ("split by", facts["splits"]["by"]),
        ("quarantined", f"{sum(facts['quarantined'].values()):,}" + (f" ({quarantined})" if quarantined else "")),
        ("remarks", ", ".join(f"{n} {reason}" for reason, n in facts["remarks"].items()) or "none"),
        ("duplicates", f"{exact}, {duplicates['near_across_splits']} near ones across splits"),
        ("report", str(out / "report.html")),
    ):
        print(f"{label:<12} {value}")
