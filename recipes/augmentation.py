"""Tune CLIP with each augmentation of `train clip` in turn left out or put in, and tell what each brings on dev.

python recipes/augmentation.py --model CLIP --data DATASET --out FOLDER [--images 40000] [--only VARIANT …] [SETTINGS]

Further options go to every `limner train clip`. Runs that are finished are only judged; the rest go on from their last
checkpoint, so that several processes may each train some of the variants before one judges all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from limner.evaluation.alignment import REPORT, Judged
from limner.evaluation.intervals import Difference, paired_difference
from limner.evaluation.retrieval import KS, Ranks
from limner.models import loading
from running import run

BASELINE = "baseline"
VARIANTS = {
    BASELINE: [],
    "no crops": ["--set", "min_scale=1"],
    "no flips": ["--set", "flips=false"],
    "no colour": ["--set", "colour=0"],
    "half joined": ["--set", "join=0.5"],
    "first captions alone": [],
    "another seed": ["--seed", "1"],
}


def main() -> None:
    """Train what is not trained, and print a table of all that are, each against the preset as it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="the CLIP to tune: a run, a folder, a hub id or builtin")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--images", default="40000", help="pictures of each training (default 40000)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="variants to train")
    given, settings = parser.parse_known_args()
    for name in given.only:
        data = first_captions(given.data, given.out / "data") if name == "first captions alone" else given.data
        command = ["limner", "train", "clip", "--preset", "builtin", "--model", given.model, "--data", str(data)]
        command += ["--images", given.images, "--out", str(folder(given.out, name)), *VARIANTS[name], *settings]
        subprocess.run(command, check=True)
    dev = Judged.of(given.data, "val")
    trained = [name for name in VARIANTS if (folder(given.out, name) / REPORT).is_file()]
    hits = {name: found(dev.ranks(loading.load_clip(str(folder(given.out, name))))) for name in trained}
    print("| dev, % | " + " | ".join(f"R@{k}" for k in KS) + " | all three |\n" + "| --- |" + " ---: |" * (len(KS) + 1))
    for name, own in hits.items():
        cells = [f"{value:.1f}" for value in own.mean(dim=0).tolist()]
        if name != BASELINE and BASELINE in hits:
            gaps = map(paired_difference, own.T, hits[BASELINE].T)
            cells = [f"{cell} ({told(gap)})" for cell, gap in zip(cells, gaps)]
        print(f"| {name} | " + " | ".join(cells) + " |")


def folder(out: Path, name: str) -> Path:
    """Where a variant's run lies."""
    return out / name.replace(" ", "-")


def first_captions(data: Path, out: Path) -> Path:
    """The dataset with only the first of each train picture's captions; the pictures stay where they are."""
    for split in ("train", "val", "test"):
        lines = (data / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["file_name"] = str((data / split / row["file_name"]).resolve())
            row["captions"] = row["captions"][: 1 if split == "train" else None]
        (out / split).mkdir(parents=True, exist_ok=True)
        (out / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(data / "dataset.json", out)
    return out


def found(ranks: Ranks) -> Tensor:
    """Per cent of each picture's captions that find it among the k nearest for each k, and the mean -> (N, K + 1)."""
    hits = (ranks.text[:, None] < torch.tensor(KS)).double() * 100  # (M, K)
    sums = torch.zeros(len(ranks.images), len(KS), dtype=torch.double).index_add(0, ranks.owners, hits)
    shares = sums / ranks.owners.bincount()[:, None]  # (N, K)
    return torch.cat([shares, shares.mean(dim=1, keepdim=True)], dim=1)


def told(gap: Difference) -> str:
    """A difference with its interval, in points."""
    return f"{gap.value:+.1f}, {gap.low:+.1f} to {gap.high:+.1f}"


if __name__ == "__main__":
    run(main)
