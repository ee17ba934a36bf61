"""Write docs/report: what the built-in model reaches, against its base CLIP, over steps and over its training.

python docs/report.py --data data/flickr8k --judge runs/judge --out runs/report [--run RUN] [--base MODEL] [-n 200]
    [--engine openvino]

RUN is the training of the U-Net, with the checkpoints that it kept, MODEL a model with the CLIP as it was before it was
tuned; without one of them its section is left out. Each section is one call of `limner evaluate`, whose whole report is
in OUT; what was drawn is kept, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from limner.artifacts import atomic_file, read_json, write_text
from limner.evaluation.kinds import KINDS
from limner.settings import MISSION

FOLDER = Path(__file__).with_name("report")
STEPS = (2, 4, 8, 20)
LOOK = ("--steps", "8", "--guidance", "6")  # of checkpoints, which no manifest says it for
SIDE, QUALITY = 1000, 60  # pixels and quality of plots
SHEET = 128  # pixels of a picture


@dataclass(frozen=True)
class Part:
    """A section of the report: one call of `limner evaluate`."""

    name: str
    title: str
    says: str
    arguments: Sequence[str]
    figures: Sequence[str]


def parts(model: str, base: str | None, run: str | None, count: int) -> list[Part]:
    """What is told, in its order."""
    few = ["-n", str(count)]
    quick = [*few, "--set", "copies=false", "--set", "attribute_seeds=0"]
    curve = ["r_precision", "clip_score", "frechet", "cmmd", "recall"]
    told = [Part("steps", "Steps against quality", "", [model, *_each("--steps", STEPS), *quick], [*curve, "seconds"])]
    if run is not None:
        says = f"The weight average of each checkpoint that a training of the U-Net kept, {run}."
        told.append(Part("training", "Checkpoints over training", says, [run, "--checkpoints", *LOOK, *quick], curve))
    if base is not None:
        says = (
            "The first column behind the photographs is a model with the base CLIP, under the same U-Net, which is "
            "fitted to the tuned one."
        )
        figures = [name for name in KINDS if name not in ("memory", "seconds")]
        told.insert(0, Part("clip", "Base CLIP against tuned", says, [base, model, *few], figures))
    return told


def _each(flag: str, values: Sequence[int]) -> list[str]:
    return [word for value in values for word in (flag, str(value))]


def evaluate(arguments: Sequence[str]) -> str:
    """Evaluate, and tell the command as a user writes it."""
    command = ["limner", "evaluate", *arguments]
    subprocess.run([str(Path(sys.executable).with_name("limner")), *command[1:]], check=True)
    return shlex.join(command)


def table(metrics: Mapping[str, Any], names: Sequence[str]) -> str:
    """Figures with their intervals, a column for the photographs and for each contender, as Markdown."""
    rows = [metrics["photographs"], *metrics["contenders"]]
    found = [{name: one for section in row["figures"].values() for name, one in section.items()} for row in rows]
    lines = [["figure", *(row["label"] for row in rows)], ["---", *("---:" for _ in rows)]]
    for name in names:
        if any(name in figures for figures in found[1:]):
            lines.append([KINDS[name].title, *(_cell(name, figures) for figures in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(name: str, figures: Mapping[str, Any]) -> str:
    if name not in figures:
        return ""
    shown = {key: KINDS[name].shown(figures[name][key]) for key in ("value", "low", "high")}
    unit = KINDS[name].unit
    return f"{shown['value']} ({shown['low'].removesuffix(unit).strip()} to {shown['high'].removesuffix(unit).strip()})"


def apart(metrics: Mapping[str, Any]) -> str:
    """Which figures of two models differ by more than chance, as Markdown."""
    lines = []
    for pair in metrics["comparisons"]:
        clear = [
            f"{KINDS[name].title} by {KINDS[name].shown(one['value'])} (p {one['p']:.3g})"
            for name, one in pair["figures"].items()
            if one["p"] < 0.05
        ]
        lines.append(f"{pair['one']} differs from {pair['other']} in {', '.join(clear) or 'nothing that is clear'}.")
    return "\n\n".join(lines)


def pictures(out: Path, file: Path) -> None:
    """The two prompts of the mission, a row each, as all contenders of an evaluation drew them, as a WebP."""
    columns = sorted((out / "pictures").iterdir())
    sheet = Image.new("RGB", (SHEET * len(columns), SHEET * len(MISSION)), "white")
    for x, folder in enumerate(columns):
        for y in range(len(MISSION)):
            with Image.open(folder / "mission" / f"{y + 1}.png") as image:
                sheet.paste(image.resize((SHEET, SHEET)), (x * SHEET, y * SHEET))
    with atomic_file(file) as partial:
        sheet.save(partial, "WEBP", quality=QUALITY + 20)


def section(part: Part, command: str, out: Path) -> str:
    """A part as Markdown; its plots and pictures are written beside it."""
    metrics = read_json(out / "metrics.json")
    text = [f"## {part.title}", part.says, f"```sh\n{command}\n```", table(metrics, part.figures)]
    if part.name == "clip":
        text.append(apart(metrics))
    for plot in sorted(out.glob("sweep-*.png")):
        file = FOLDER / f"{plot.stem}.webp"
        with Image.open(plot) as image, atomic_file(file) as partial:
            image.thumbnail((SIDE, SIDE))
            image.convert("RGB").save(partial, "WEBP", quality=QUALITY)
        text.append(f"![{part.title}]({file.name})")
    pictures(out, FOLDER / f"{part.name}.webp")
    labels = ", ".join(sorted(row["label"] for row in metrics["contenders"]))
    text.append(f"![Both prompts of the mission, drawn by {labels}]({part.name}.webp)")
    return "\n\n".join(filter(None, text))


def main() -> None:
    """Draw, judge and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--judge", type=Path, required=True, help="folder of recipes/judge.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and whole reports")
    parser.add_argument("--base", help="a model with the CLIP before tuning")
    parser.add_argument("--run", help="a run of limner train unet, whose checkpoints are judged")
    parser.add_argument("--model", default="builtin", help="the model that is told of")
    parser.add_argument("-n", type=int, default=200, help="captions that are drawn")
    parser.add_argument("--engine", default="torch", help="what draws, torch or openvino")
    given = parser.parse_args()
    text = [
        f"# What {given.model} reaches",
        f"Written by `{shlex.join(['python', 'docs/report.py', *sys.argv[1:]])}`: {given.n} captions of the test "
        "split, seen by the judge of recipes/judge.py, with 95 % intervals in brackets. `photographs` are the real "
        "ones with their own captions; "
        "where distances are told, as many of the train split. What tuning the CLIP gained stands in its model card, "
        "what that did to pictures in [experiments.md](../experiments.md), with the command.",
    ]
    shared = ["--data", str(given.data), "--judge", str(given.judge), "--set", f"cache={given.judge}-features"]
    shared += ["--engine", given.engine]
    for part in parts(given.model, given.base, given.run, given.n):
        out = given.out / part.name
        command = evaluate([*part.arguments, *shared, "--out", str(out)])
        text.append(section(part, command, out))
    write_text(FOLDER / "README.md", "\n\n".join(text) + "\n")
    print(FOLDER / "README.md")


if __name__ == "__main__":
    main()
