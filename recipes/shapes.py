"""Draw a source for `limner prepare imagefolder`: coloured shapes with five captions each.

python recipes/shapes.py FOLDER [COUNT]
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": "#d23", "green": "#3a4", "blue": "#35c", "yellow": "#fc3", "white": "#fff", "black": "#111"}
SHAPES = {"circle": "ellipse", "square": "rectangle"}
SAYINGS = (
    "A {colour} {shape} on a {ground} ground.",
    "There is a {colour} {shape} on {ground}.",
    "A {ground} picture with a {colour} {shape} in it.",
    "One {colour} {shape} before a {ground} wall.",
    "A {shape} that is {colour}, on {ground} paper.",
)
SIDE = 64


def main(folder: Path, count: int) -> None:
    """Write pictures and metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        rng = random.Random(number)
        ground, colour = rng.sample(sorted(COLOURS), 2)
        shape = rng.choice(sorted(SHAPES))
        image = Image.new("RGB", (SIDE, SIDE), COLOURS[ground])
        radius = rng.randint(10, 24)
        x, y = (rng.randint(radius, SIDE - radius) for _ in range(2))
        box = (x - radius, y - radius, x + radius, y + radius)
        getattr(ImageDraw.Draw(image), SHAPES[shape])(box, fill=COLOURS[colour])
        name = f"{number:04d}.png"
        image.save(folder / name)
        words = {"colour": colour, "shape": shape, "ground": ground}
        rows.append({"file_name": name, "captions": [saying.format(**words) for saying in SAYINGS]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 96)
