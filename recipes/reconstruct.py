"""Send photographs through a VAE and back, for a judge of pictures: what is lost there, no U-Net can draw.

python recipes/reconstruct.py --vae MODEL --data DATASET --out FOLDER [--split val] [-n 300] [--size 128]

Then `limner evaluate --images FOLDER --data DATASET --split val -n 300 --judge JUDGE --set copies=false`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from limner.data.dataset import read_split
from limner.data.pictures import load_pixels
from limner.evaluation.contenders import photographs
from limner.evaluation.reconstruction import reconstructed
from limner.generation.engine import to_images
from limner.models import loading
from running import run


def main() -> None:
    """Write a PNG for each photograph, under its name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", required=True, help="a model or a VAE: builtin, a folder, a run or a hub id")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="whose photographs (default val)")
    parser.add_argument("-n", type=int, default=300, help="how many of them (default 300)")
    parser.add_argument("--size", type=int, default=128, help="their side in pixels (default 128)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    vae = loading.load_vae(arguments.vae)
    for record in photographs(read_split(arguments.data, arguments.split), arguments.n):
        again = reconstructed(vae, load_pixels(record.path, arguments.size)[None])  # (1, 3, size, size)
        to_images(again)[0].save(arguments.out / f"{record.path.stem}.png")


if __name__ == "__main__":
    run(main)
