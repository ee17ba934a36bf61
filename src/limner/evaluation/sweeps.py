"""Plots of figures against what contenders of an evaluation differ in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limner.evaluation import plots, report
from limner.evaluation.kinds import by_name
from limner.generation.provenance import slug


def plot(rows: Sequence[dict[str, Any]], out: Path, x_name: str | None) -> None:
    """A plot for each setting that contenders differ in; a plot of an earlier call goes."""
    for old in out.glob(report.SWEEPS):
        old.unlink()
    for name in sorted({name for row in rows for name in row["settings"]}):
        plots.plot_sweep(name, curves(name, rows, x_name), out / report.SWEEPS.replace("*", slug(name)))


def curves(name: str, rows: Sequence[dict[str, Any]], x_name: str | None) -> list[tuple[str, plots.Curve]]:
    """Contenders' figures against a setting, those together that differ in it alone, under what their labels share.

    They are of one model, unless it is `x_name`, what the models differ in.
    """
    alike = defaultdict(list)
    for row in rows:
        if name in row["settings"]:
            rest = {key: value for key, value in row["settings"].items() if key != name}
            alike[None if name == x_name else row["model"], tuple(sorted(rest.items()))].append(row)
    found: list[tuple[str, plots.Curve]] = []
    for some in alike.values():
        if len({row["settings"][name] for row in some}) > 1:
            labels = [row["label"].split(", ") for row in some]
            shared = ", ".join(word for word in labels[0] if all(word in others for others in labels))
            found.append((shared, [(row["settings"][name], by_name(row["figures"])) for row in some]))
    return found
