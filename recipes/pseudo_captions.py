"""Caption photographs that have no captions with those of others which match them best, and join them to a dataset.

python recipes/pseudo_captions.py --data DATASET --extra DATASET --captions FILE --teacher FOLDER --out FOLDER

The teacher (a folder of recipes/judge.py with `--network lite0`, or a CLIP) chooses among the train captions and those
of FILE, one a line. FOLDER becomes a dataset folder: the first dataset's train split with the photographs that found a
match, and its val and test splits. All pictures stay where they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from limner.artifacts import atomic_folder, read_json, sha256, write_json
from limner.data.dataset import SPLITS, Record, read_split, read_training_split, split_identity
from limner.evaluation.extractors import features_of, text_features_of
from limner.evaluation.features import captions_of
from limner.evaluation.yardstick import Yardstick
from limner.training.teaching import captions_in
from running import run

BLOCK = 512  # photographs whose likeness to every caption is in memory at once


@torch.no_grad()
def nearest(pictures: Tensor, texts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and numbers of the `count` texts nearest to each picture, best first -> (N, count) twice.

    Pictures (N, E) and texts (M, E), M at least `count`.
    """
    texts = normalize(texts, dim=1)
    blocks = [(normalize(some, dim=1) @ texts.T).topk(count, dim=1) for some in pictures.split(BLOCK)]
    return torch.cat([block.values for block in blocks]), torch.cat([block.indices for block in blocks])


def rows(records: list[Record]) -> Iterator[str]:
    """Lines of metadata that find pictures where they are."""
    for record in records:
        first = record.captions[0] if record.captions else ""
        row = {"file_name": str(record.path.resolve()), "captions": record.captions, "text": first}
        yield json.dumps(row, ensure_ascii=False) + "\n"


def main() -> None:
    """Choose captions, and write the dataset."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="dataset folder of captioned pictures")
    parser.add_argument("--extra", type=Path, required=True, help="dataset folder of photographs without captions")
    parser.add_argument("--captions", type=Path, required=True, help="text file of further captions, one a line")
    parser.add_argument("--teacher", required=True, help="who matches: a folder of recipes/judge.py, or a CLIP")
    parser.add_argument("--out", type=Path, required=True, help="dataset folder to write")
    parser.add_argument("--share", type=float, default=0.8, help="of the photographs that is kept (default 0.8)")
    parser.add_argument("--each", type=int, default=5, help="captions of each (default 5)")
    given = parser.parse_args()
    own = read_training_split(given.data, captioned=True)
    extra = [record for record in read_training_split(given.extra, captioned=False) if not record.captions]
    captions = sorted({*captions_of(own)[0], *captions_in(given.captions)})
    teacher = Yardstick.find(given.teacher)
    cache = given.out.parent / "features"
    pictures = teacher.embed(features_of(teacher.extractor, [record.path for record in extra], cache=cache))
    texts = teacher.embed_text(text_features_of(teacher.reader, captions, cache=cache))
    cosines, numbers = nearest(pictures, texts, given.each)
    best = cosines[:, 0].topk(round(given.share * len(extra))).indices.sort().values
    found = [Record(extra[row].path, tuple(captions[number] for number in numbers[row])) for row in best.tolist()]

    facts = read_json(given.data / "dataset.json")
    facts["counts"]["train"] = len(own) + len(found)
    facts["captions"]["train"] += given.each * len(found)
    facts["pseudo_captions"] = {
        "photographs": len(found),
        "of": split_identity(given.extra, "train"),
        "captions": sha256(given.captions),
        "teacher": teacher.sha256,
        "each": given.each,
        "least_cosine": cosines[best, 0].min().item(),
    }
    with atomic_folder(given.out) as partial:
        for split in SPLITS:
            records = [*own, *found] if split == "train" else read_split(given.data, split)
            (partial / split).mkdir()
            (partial / split / "metadata.jsonl").write_text("".join(rows(records)), encoding="utf-8")
        write_json(partial / "dataset.json", facts)
    least = facts["pseudo_captions"]["least_cosine"]
    print(f"{len(found)} of {len(extra)} photographs found captions; the poorest match has a cosine of {least:.2f}.")


if __name__ == "__main__":
    run(main)
