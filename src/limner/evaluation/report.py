"""`report.html` of an evaluation: figures with intervals, and the pictures that they are of, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limner.artifacts import write_text
from limner.data import page
from limner.evaluation.assessment import FURTHER, Result
from limner.evaluation.kinds import GLANCE, KINDS, SECTIONS

Mission = tuple[str, Sequence[tuple[str, Path]]]
"""A prompt that is shown first, and by contender the picture that was drawn for it."""
PAGE, SWEEPS = "report.html", "sweep-*.png"
COLOURS = 6  # of contenders, which then repeat
SHOWN = 3  # pictures each of the best, the median and the worst
SIDE = 256  # pixels of a picture's longer side
LONG = 12  # of a hash that is shown
WAYS = {"copies_by_features": "by features", "copies_by_pixels": "by pixels"}


@dataclass(frozen=True)
class Bar:
    """A contender's line in a card: its value, and where that and the interval lie, in per cent of the width."""

    label: str
    colour: int
    """0 for the photographs, then 1, 2, ..."""
    value: str
    interval: str
    at: float
    left: float
    width: float


@dataclass(frozen=True)
class Card:
    """A figure of all contenders that have it."""

    name: str
    title: str
    says: str
    better: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Shot:
    """A picture with its caption, and what is said of it."""

    url: str
    caption: str
    note: str = ""


def write(out: Path, metrics: Mapping[str, Any], results: Sequence[Result], missions: Sequence[Mission]) -> None:
    """Write `out`/report.html of what metrics.json has, of plots that lie in `out`, and of pictures.

    Raises OSError as the writing does.
    """
    rows = list(enumerate([metrics["photographs"], *metrics["contenders"]]))
    titles = {**SECTIONS, **{FURTHER + of["name"]: f"Fidelity by {of['name']}" for of in metrics["extractors"]}}
    cards = {section: _cards(section, rows) for section in titles}
    by_name = {card.name: card for section in SECTIONS for card in cards[section]}
    plots = {file.stem.split("-", 1)[1]: page.inline(file) for file in sorted(out.glob(SWEEPS))}
    html = page.render(
        "limner.evaluation",
        PAGE,
        metrics=metrics,
        missions=[(prompt, [Shot(_shot(file), prompt, label) for label, file in files]) for prompt, files in missions],
        glance=[by_name[name] for name in GLANCE if name in by_name],
        sections=[(name, titles[name], found) for name, found in cards.items() if found],
        comparisons=[(row, _differences(row["figures"])) for row in metrics["comparisons"]],
        plots=plots,
        examples=[(result.contender.label, _examples(result)) for result in results if result.seen is not None],
        pairs=[(result.contender.label, WAYS[way], _pairs(result, way)) for result in results for way in result.pairs],
        long=LONG,
    )
    write_text(out / PAGE, html)


def _shot(file: Path) -> str:
    return page.thumbnail(file, SIDE)


def _cards(section: str, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Card]:
    """A card a figure of a section, in the order of `KINDS`."""
    with_section = [(colour, row["label"], row["figures"].get(section, {})) for colour, row in rows]
    names = [name for name in KINDS if any(name in figures for _, _, figures in with_section)]
    return [_card(name, [(c, label, f[name]) for c, label, f in with_section if name in f]) for name in names]


def _card(name: str, found: Sequence[tuple[int, str, Mapping[str, float]]]) -> Card:
    kind = KINDS[name]
    low = min(0.0, *(figure["low"] for _, _, figure in found))
    high = max(figure["high"] for _, _, figure in found)
    if kind.unit == "%" and high <= 1:
        high = max(high, 0.01)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return round(100 * (value - low) / span, 2)

    bars = []
    for colour, label, figure in found:
        ends = "" if figure["count"] == 1 else f"{_bare(name, figure['low'])} to {_bare(name, figure['high'])}"
        left = place(figure["low"])
        width = round(place(figure["high"]) - left, 2)
        shade = (colour - 1) % COLOURS + 1 if colour else 0
        bars.append(
            Bar(
                label if colour else _called(name, label),
                shade,
                kind.shown(figure["value"]),
                ends,
                place(figure["value"]),
                left,
                width,
            )
        )
    return Card(name, kind.title, kind.says, kind.better, bars)


def _called(name: str, label: str) -> str:
    """What the photographs are called: they are others where distances are told, those of training."""
    fidelity = ("frechet", "kernel_distance", "cmmd", "precision", "recall", "density", "coverage")
    return "training photographs" if name in fidelity else label


def _bare(name: str, value: float) -> str:
    """A value without its unit, where that stands beside it."""
    return KINDS[name].shown(value).removesuffix(KINDS[name].unit).strip()


def _differences(figures: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Rows of the table of a comparison; what is clear, by the interval and the test, is said in words."""
    rows = []
    for name, kind in KINDS.items():
        if name not in figures:
            continue
        found = figures[name]
        clear = (found["low"] > 0) == (found["high"] > 0) and found["p"] < 0.05
        is_better = (found["value"] > 0) == (kind.better == "more")
        rows.append(
            {
                "title": kind.title,
                "value": ("+" if found["value"] > 0 else "") + kind.shown(found["value"]).replace("-", "−"),
                "interval": f"{_bare(name, found['low'])} to {_bare(name, found['high'])}".replace("-", "−"),
                "p": "< 0.01" if found["p"] < 0.01 else f"{found['p']:.2f}",
                "verdict": ("better" if is_better else "worse") if clear else "not told apart",
                "count": found["count"],
            }
        )
    return rows


def _examples(result: Result) -> list[tuple[str, list[Shot]]]:
    """Pictures with the best, the median and the worst score."""
    assert result.seen is not None
    score = result.seen.values["clip_score"]
    order = score.argsort(descending=True, stable=True).tolist()
    count = min(SHOWN, len(order) // 3)
    middle = (len(order) - count) // 2
    groups = {"Best": order[:count], "Median": order[middle : middle + count], "Worst": order[len(order) - count :]}
    records = result.contender.records
    return [
        (name, [Shot(_shot(records[n].path), records[n].captions[0], f"score {score[n]:.2f}") for n in some])
        for name, some in groups.items()
        if some
    ]


def _pairs(result: Result, way: str) -> list[tuple[str, str, str]]:
    """A picture, its nearest training photograph, and what is said of them."""
    return [
        (_shot(pair.picture), _shot(pair.photograph), f"{'copy, ' if pair.is_copy else ''}distance {pair.distance:.3g}")
        for pair in result.pairs[way]
    ]
