"""`report.html`: what a dataset holds and what was wrong with it, in one file that opens offline."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from limner.artifacts import write_text
from limner.data import page
from limner.data.checks import CLIP_LENGTH
from limner.data.dataset import SPLITS
from limner.data.decode import Outcome
from limner.data.duplicates import NEAR, Pair
from limner.data.findings import Finding

EXAMPLES, SHOWN_PAIRS, SHOWN_FINDINGS, TOP_WORDS, TOP_SIZES = 12, 24, 60, 40, 8
LONGEST_BAR = 30  # words; the last bar holds all captions above
STOP_WORDS = set(
    re.findall(
        r"\w+",
        "a an and are as at be by for from has have he her his in into is it its of off on one onto or out over she "
        "some that the their them there they this through to two up while who with",
    )
)


@dataclass(frozen=True)
class Item:
    """A picture of the finished dataset."""

    outcome: Outcome
    captions: tuple[str, ...]

    @property
    def split(self) -> str:
        """The split that its file lies in."""
        return self.outcome.file.split("/")[0]


def write_report(
    out: Path, facts: dict[str, Any], items: Sequence[Item], findings: Sequence[Finding], pairs: Sequence[Pair]
) -> None:
    """Write `out/report.html` from `dataset.json`'s facts, the pictures, the findings and the look-alikes."""
    step = max(1, len(items) // EXAMPLES)
    shown_pairs = [
        (pair, page.thumbnail(out / pair.one), page.thumbnail(out / pair.other)) for pair in pairs[:SHOWN_PAIRS]
    ]
    html = page.render(
        "limner.data",
        "report.html",
        facts=facts,
        splits=_split_rows(items),
        sizes=_sizes(items),
        changes=Counter(change for item in items for change in item.outcome.changes).most_common(),
        lengths=_lengths(items),
        words=_words(items),
        examples=[(item, page.thumbnail(out / item.outcome.file)) for item in items[::step][:EXAMPLES]],
        pairs=shown_pairs,
        near=NEAR,
        quarantined=_by_reason(f for f in findings if not f.kept),
        remarks=_by_reason(f for f in findings if f.kept),
        shown=SHOWN_FINDINGS,
        clip_length=CLIP_LENGTH,
    )
    write_text(out / "report.html", html)


def _split_rows(items: Sequence[Item]) -> list[tuple[str, int, int, str]]:
    """Split, pictures, captions, and how many captions a picture has."""
    rows: list[tuple[str, int, int, str]] = []
    for split in SPLITS:
        counts = [len(item.captions) for item in items if item.split == split]
        each = "–" if not counts else f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"
        rows.append((split, len(counts), sum(counts), each))
    return rows


def _sizes(items: Sequence[Item]) -> dict[str, Any]:
    outcomes = [item.outcome for item in items]
    common = Counter(f"{o.width} × {o.height}" for o in outcomes)
    shorter = sorted(min(o.width, o.height) for o in outcomes)
    return {
        "common": _bars(common.most_common(TOP_SIZES)),
        "kinds": len(common),
        "shorter": (shorter[0], int(median(shorter)), shorter[-1]),
        "megabytes": sum(o.size for o in outcomes) / 1e6,
    }


def _lengths(items: Sequence[Item]) -> dict[str, Any] | None:
    """How many captions have how many words; None where there are no captions."""
    words = [len(caption.split()) for item in items for caption in item.captions]
    if not words:
        return None
    counts = Counter(min(n, LONGEST_BAR) for n in words)
    labels = [str(n) if n < LONGEST_BAR else f"{n}+" for n in range(1, LONGEST_BAR + 1)]
    bars = _bars([(label, counts[n]) for n, label in enumerate(labels, start=1)])
    return {"bars": bars, "range": (min(words), int(median(words)), max(words))}


def _words(items: Sequence[Item]) -> list[tuple[str, int, float]]:
    words = Counter(
        word
        for item in items
        for caption in item.captions
        for word in re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", caption.lower())
    )
    telling = [(word, n) for word, n in words.most_common() if word not in STOP_WORDS]
    return _bars(telling[:TOP_WORDS])


def _bars(counts: Sequence[tuple[str, int]]) -> list[tuple[str, int, float]]:
    """Label, count, and length of the bar in percent of the longest."""
    most = max((n for _, n in counts), default=0) or 1
    return [(label, n, round(100 * n / most, 1)) for label, n in counts]


def _by_reason(findings: Iterable[Finding]) -> list[tuple[str, list[Finding]]]:
    groups = defaultdict(list)
    for finding in findings:
        groups[finding.reason].append(finding)
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
