"""Figures as pictures: a sweep over mixes, the drift of token states, and drawn pictures side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from limner.artifacts import atomic_file
from limner.evaluation.kinds import GLANCE, KINDS
from limner.evaluation.retrieval import KS
from limner.generation import sheets
from limner.generation.engine import to_images
from limner.generation.sheets import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Told apart by the colour-blind: Okabe and Ito, Color Universal Design, 2008."""
LINES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"))
WAYS = {"text_to_image": "Caption finds picture", "image_to_text": "Picture finds caption"}
LAYERS = {"last": "last layer", "penultimate": "layer before it"}
PANELS = {
    "cmmd": "CMMD to photographs, less is better",
    "clip_score": "CLIP score, more is better",
    "r_precision": "R-precision, more is better",
}


def plot_alpha(rows: Sequence[Mapping[str, Any]], chosen: float, path: Path) -> None:
    """Write a PNG of recall, drift and, where there are any, picture figures against alpha, with the chosen alpha.

    `rows` as `mixing.choose` takes them. Bands are 95 % intervals. Raises OSError.
    """
    alphas = [row["alpha"] for row in rows]
    drawn = [name for name in PANELS if name in rows[0]]
    figure = _figure(3.1 + 2.7 * bool(drawn))
    axes = figure.subplots(1 + bool(drawn), 3, squeeze=False)
    for panel, (way, title) in zip(axes[0], WAYS.items()):
        for k, look in zip(KS, LINES):
            found = [row[f"{way}_r@{k}"] for row in rows]
            _line(panel, alphas, [f["value"] for f in found], look, f"R@{k}")
            panel.fill_between(
                alphas, [f["low"] for f in found], [f["high"] for f in found], color=look[0], alpha=0.15, linewidth=0
            )
        _name(panel, title, "share found", "alpha")
    axes[0][1].sharey(axes[0][0])
    unit = "mean cosine to the base"
    kept = {label: [row["drift"][layer] for row in rows] for layer, label in LAYERS.items()}
    if "zero_shot_top1" in rows[0]:
        kept["zero-shot top-1"] = [row["zero_shot_top1"] for row in rows]
        unit += ", accuracy"
    for look, (label, values) in zip(LINES, kept.items()):
        _line(axes[0][2], alphas, values, look, label)
    _name(axes[0][2], "Kept of the base", unit, "alpha")
    for panel, name in zip(axes[-1], drawn):
        _line(panel, alphas, [row[name] for row in rows], LINES[0], None)
        _name(panel, "Drawn pictures", PANELS[name], "alpha")
    for panel in figure.axes:
        panel.axvline(chosen, color=GREY, linestyle="--", linewidth=1)
    figure.suptitle(
        f"From the base CLIP (alpha 0) to the tuned one (alpha 1); dashed: the choice, {chosen:g}", fontsize=10
    )
    _save(figure, path)


def plot_bench(rows: Sequence[Mapping[str, Any]], unit: str, path: Path) -> None:
    """Write a PNG of score against seconds a picture: a line an engine, precision and scheduler, with its steps.

    `rows` as `limner bench` measures them, `unit` what a score is. Raises OSError.
    """
    figure = _figure(4.2)
    panel = figure.subplots()
    by_line = itemgetter("engine", "precision", "scheduler")
    for look, key in zip(itertools.cycle(LINES), sorted(set(map(by_line, rows)))):
        own = sorted((row for row in rows if by_line(row) == key), key=itemgetter("seconds"))
        _line(panel, [row["seconds"] for row in own], [row["score"] for row in own], look, ", ".join(key))
        for row in own:
            panel.annotate(str(row["steps"]), (row["seconds"], row["score"]), xytext=(5, 4), textcoords="offset points")
    _name(panel, "Quality against time; the numbers are steps", unit, "seconds a picture")
    _save(figure, path)


def plot_drift(drift: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of cosine and CKA between the token states of two text towers, by token position.

    `drift` as `evaluation.drift.drift` returns it. Raises OSError.
    """
    figure = _figure(3.1)
    axes = figure.subplots(1, 2, sharey=True)
    for panel, (layer, label) in zip(axes, LAYERS.items()):
        for look, (name, title) in zip(LINES, (("cosine", "cosine"), ("cka", "CKA"))):
            values = drift[layer][name]
            _line(panel, range(len(values)), values, look, title)
        _name(panel, f"Token states of the {label}", "likeness to the base", "token position")
    _save(figure, path)


Curve = Sequence[tuple[float, Mapping[str, Any]]]
"""A setting's values, and the figures with each, {"value", "low", "high"} by name."""


def plot_sweep(name: str, curves: Sequence[tuple[str, Curve]], path: Path) -> None:
    """Write a PNG of figures against a setting `name`, a line for each labelled curve. Bands are 95 % intervals.

    What one lacks is drawn for none; where that is all, or there is no curve, nothing is written. Raises OSError.
    """
    drawn = [figure for figure in GLANCE if all(figure in figures for _, rows in curves for _, figures in rows)]
    if not curves or not drawn:
        return
    across = min(3, len(drawn))
    figure = _figure(2.9 * -(-len(drawn) // across))
    axes = figure.subplots(-(-len(drawn) // across), across, squeeze=False)
    for panel, key in zip(axes.flat, drawn):
        kind = KINDS[key]
        scale = 100 if kind.unit == "%" else 1
        for look, (label, rows) in zip(itertools.cycle(LINES), curves):
            xs, found = zip(*sorted(((x, figures[key]) for x, figures in rows), key=itemgetter(0)))
            _line(panel, xs, [scale * one["value"] for one in found], look, label or None)
            low, high = ([scale * one[end] for one in found] for end in ("low", "high"))
            panel.fill_between(xs, low, high, color=look[0], alpha=0.15, linewidth=0)
        _name(panel, kind.title, f"{kind.unit or 'value'}, {kind.better} is better", name)
    for panel in list(axes.flat)[len(drawn) :]:
        panel.set_axis_off()
    _save(figure, path)


def _figure(height: float) -> Figure:
    """An empty figure 8 inches wide, so that its text is read well at 800 pixels."""
    from matplotlib.figure import Figure

    return Figure((8, height), layout="constrained")


def _line(panel: Axes, x: Sequence[float], y: Sequence[float | None], look: tuple[str, str], label: str | None) -> None:
    colour, marker = look
    apart = -(-len(y) // 11)  # so that many markers don't thicken the line
    known = [math.nan if value is None else value for value in y]
    panel.plot(x, known, color=colour, marker=marker, markersize=3, markevery=apart, linewidth=1.2, label=label)


def _name(panel: Axes, title: str, y: str, x: str) -> None:
    """Title, axes and, where lines have names, a legend."""
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8, edgecolor="none", framealpha=0.9)


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=200)


def grid(columns: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """Write a PNG of pictures side by side: a column a label, a row a caption, which stands above it.

    columns: pixels (N, 3, H, W) in [-1, 1] by label; captions: N. No pixel is scaled. Raises OSError.
    """
    sheet = sheets.grid({label: to_images(pixels) for label, pixels in columns.items()}, captions)
    with atomic_file(path) as partial:
        sheet.save(partial, format="PNG")
