"""Score a model by a judge and complete its MODEL_CARD.md by what was found, with two pictures of pictures.

python recipes/card.py --model FOLDER --data DATASET --judge JUDGE --out EVALUATION [-n N] [--seeds S] [--cache FOLDER]
    [--engine openvino]

`limner evaluate` draws for the test captions in EVALUATION and scores that; called again, it goes on. FOLDER then gets

pictures.webp    fixed prompts at fixed seeds: the mission's, one of each common theme of Flickr8k, and some too hard
nearest.webp     the drawn pictures that come nearest to a training photograph, beside that photograph

and its card the sections from `FIGURES` on, in place of those of an earlier call. Nothing is picked by hand.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import limner
from limner.artifacts import atomic_file, read_json, sha256, write_text
from limner.config import EvaluateConfig
from limner.data.dataset import read_split
from limner.evaluation import attributes
from limner.evaluation.extractors import Extractor, features_of
from limner.evaluation.kinds import KINDS, SECTIONS
from limner.evaluation.scores import Training
from limner.evaluation.yardstick import Thumbnails, Yardstick
from limner.generation import sheets
from limner.generation.provenance import slug
from limner.settings import MISSION
from limner.stages import evaluate
from running import run

THEMES = (
    "Two dogs run through the snow.",
    "A brown dog jumps to catch a frisbee.",
    "Children play in the water at the beach.",
    "A man rides a wave on a surfboard.",
    "A boy on a skateboard jumps in the air.",
    "A group of people sit at a table.",
    "A woman walks down a city street.",
    "A man climbs up a rock face.",
    "Boys play football on a green field.",
    "A person rides a bicycle through the woods.",
)
TOO_HARD = ("A cat reads a newspaper.", "Five red cubes on a glass table.", "A sign that says hello.")
SEEDS = range(4)
NEAREST = 6  # drawn pictures
MOST_BYTES = 100_000  # of a picture in a card
FIGURES = "\n\n## Figures\n"
RECIPE = Path(__file__).with_name("builtin")

Row = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and the others are numbers."""
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


def figures(metrics: Row) -> str:
    """All figures of the model beside those of the photographs."""
    (model,), real = metrics["contenders"], metrics["photographs"]["figures"]
    data, judge = metrics["data"], metrics["judge"]
    drawn = f"{model['pictures']} captions of the {data['split']} split of {data['name']}, one picture each"
    told = [
        f"{drawn}, seeds {metrics['seeds'][0]} to {metrics['seeds'][1]}, {model['steps']} steps at guidance "
        f"{model['guidance']:g}, drawn with {model['device']['engine']} by `limner evaluate`, with {judge['name']} "
        f"({judge['sha256'][:12]}) as judge. The photographs have the first captions of their own; their "
        "distances are those of as many training photographs."
    ]
    for section, found in model["figures"].items():
        beside = real.get(section, {})
        rows = [
            [KINDS[name].title, shown(name, figure), shown(name, beside[name]) if name in beside else ""]
            for name, figure in found.items()
        ]
        told.append(f"### {SECTIONS[section]}\n\n{table(['', 'model', 'photographs'], rows)}")
    share = model["figures"]["alignment"]["r_precision"]["value"] / real["alignment"]["r_precision"]["value"]
    told.append(f"The R-precision is {share:.0%} of that of the photographs. In brackets: 95 % intervals.")
    return "\n\n".join(told)


def shown(name: str, figure: Row) -> str:
    """A figure with its interval."""
    value, low, high = (KINDS[name].shown(figure[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def sensitivity(yardstick: Yardstick, folder: Path, seeds: int, cache: Path) -> str:
    """Which captions the judge mistakes for another that differs in one thing, in half of the pictures or more."""
    files = [folder / f"{slug(prompt)}-{seed}.png" for prompt in attributes.PROMPTS for seed in range(seeds)]
    features = yardstick.embed(features_of(yardstick.extractor, files, cache=cache))
    images = features.unflatten(0, (-1, seeds))  # (P, S, E)
    failed = []
    for aspect, hits in attributes.preferred(images, yardstick.text_features(attributes.CAPTIONS)).items():
        asked = [contrast for contrast in attributes.CONTRASTS if contrast.aspect == aspect]
        for contrast, right in zip(asked, hits.unflatten(0, (-1, seeds)).mean(dim=1).tolist(), strict=True):
            if right <= 0.5:
                failed.append([aspect, contrast.prompt, contrast.wrong, f"{right:.0%}"])
    heading = (
        f"### Where another word does not change the picture\n\nOf {len(attributes.CONTRASTS)} pairs of captions, "
        f"{seeds} pictures each, the judge takes the wrong caption in half of the pictures or more for {len(failed)}:"
    )
    return f"{heading}\n\n{table(['', 'drawn', 'taken for', 'right'], failed)}"


def draw(model: Path) -> tuple[Image.Image, str]:
    """The fixed prompts at the fixed seeds, a row a prompt, and the section that shows them."""
    painter = limner.load(str(model))
    prompts = (*MISSION, *THEMES, *TOO_HARD)
    rows = [painter(prompt, n=len(SEEDS), seed=SEEDS[0]).images for prompt in prompts]
    columns = {f"seed {seed}": column for seed, column in zip(SEEDS, zip(*rows, strict=True), strict=True)}
    section = f"""## Pictures

Both prompts of the mission, one of each common theme of Flickr8k, and in the last {len(TOO_HARD)} rows what the model
can't draw. Seeds {SEEDS[0]} to {SEEDS[-1]}, none picked.

![{len(prompts)} prompts, {len(SEEDS)} pictures each](pictures.webp)"""
    return sheets.grid(columns, prompts), section


def nearest(yardstick: Yardstick, rows: Sequence[Row], config: EvaluateConfig) -> tuple[Image.Image, str]:
    """The pictures that come nearest to training, with the photographs that they come near, and their section.

    `rows` are those of scores.jsonl: the photographs that are drawn for, and the drawn pictures.
    """
    drawn, cache = [row for row in rows if row["contender"] != "photographs"], config.cache
    pictures = [Path(row["file"]) for row in drawn]
    train, real = ([record.path for record in read_split(config.data, split)] for split in ("train", config.split))
    ways: dict[str, Extractor] = {"nearest by features": yardstick.extractor, "nearest by pixels": Thumbnails()}
    found = {
        name: Training.see(extractor, train, real, cache=cache).judge(extractor, pictures, cache=cache)
        for name, extractor in ways.items()
    }
    first = found["nearest by features"][1].distances.argsort(stable=True)[:NEAREST].tolist()
    shown = [opened(pictures[row]) for row in first]
    columns = {"drawn": shown} | {
        name: [opened(train[int(near.owners[row])]).resize(shown[0].size) for row in first]
        for name, (_, near) in found.items()
    }
    shares = ", ".join(f"{copies.share:.1%} ({name})" for name, (copies, _) in found.items())
    section = f"""## Memorisation

A copy is what lies nearer to a training photograph than 99.9 % of real photographs of the split do. Of {len(pictures)}
pictures that is {shares}. Below are the {len(first)} that come nearest by features, copies or not.

![Drawn pictures beside the training photographs that they come nearest to](nearest.webp)"""
    return sheets.grid(columns, [drawn[row]["caption"] for row in first]), section


def opened(file: Path) -> Image.Image:
    """A picture in RGB, its file closed."""
    with Image.open(file) as image:
        return image.convert("RGB")


def save(image: Image.Image, file: Path) -> None:
    """Write a WebP as good as fits."""
    for quality in range(90, 0, -10):
        written = io.BytesIO()
        image.save(written, "WEBP", quality=quality, method=6)
        if written.tell() <= MOST_BYTES:
            break
    with atomic_file(file) as partial:
        partial.write_bytes(written.getvalue())


def main() -> None:
    """Score, draw, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder whose card is completed")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--judge", required=True, help="folder of recipes/judge.py, or a CLIP that is not the model's")
    parser.add_argument("--out", type=Path, required=True, help="folder of the evaluation")
    parser.add_argument("-n", type=int, help="test captions to draw for; one a photograph when left out")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt of the sensitivity test")
    parser.add_argument("--cache", type=Path, help="where recipes/judge.py kept what it saw")
    parser.add_argument("--engine", default="torch", help="what draws for the evaluation, torch or openvino")
    given = parser.parse_args()
    cache = given.cache or given.out / "features"
    config = EvaluateConfig(
        models=(str(given.model),),
        data=given.data,
        judge=given.judge,
        n=given.n,
        engine=given.engine,
        out=given.out,
        attribute_seeds=given.seeds,
        cache=cache,
    )
    evaluate.run(config)
    lines = (given.out / evaluate.SCORES).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    yardstick = Yardstick.find(given.judge)
    within = Path(rows[-1]["file"]).parent / evaluate.ATTRIBUTES
    pictures, shown_pictures = draw(given.model)
    pairs, shown_pairs = nearest(yardstick, rows, config)
    save(pictures, given.model / "pictures.webp")
    save(pairs, given.model / "nearest.webp")
    told = [
        figures(read_json(given.out / evaluate.METRICS)),
        sensitivity(yardstick, within, given.seeds, cache),
        shown_pictures,
        shown_pairs,
        f"Made by `recipes/builtin`, of sha256 `{sha256(RECIPE)}`.",
    ]
    card = given.model / "MODEL_CARD.md"
    text = card.read_text(encoding="utf-8").split(FIGURES)[0].rstrip()
    write_text(card, text + FIGURES + "\n" + "\n\n".join(told) + "\n")
    print(card)


if __name__ == "__main__":
    run(main)
