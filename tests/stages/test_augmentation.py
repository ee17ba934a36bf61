"""recipes/augmentation.py: the data set that it makes, and what it counts."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from limner.data.dataset import read_split
from limner.evaluation.intervals import Difference
from limner.evaluation.retrieval import Ranks, recall
from trainings import RECIPES

recipe = runpy.run_path(str(RECIPES / "augmentation.py"))


def test_first_captions_alone_are_of_train_alone(data: Path, tmp_path: Path) -> None:
    made = recipe["first_captions"](data, tmp_path / "made")
    for split in ("train", "val"):
        before, after = read_split(data, split), read_split(made, split)
        assert [record.path.read_bytes() for record in after] == [record.path.read_bytes() for record in before]
        few = 1 if split == "train" else None
        assert [record.captions for record in after] == [record.captions[:few] for record in before]


def test_pictures_with_as_many_captions_count_as_recall_does() -> None:
    generator = torch.Generator().manual_seed(0)
    text, images = (torch.randint(0, 20, (count,), generator=generator) for count in (60, 12))
    ranks = Ranks(text, images, torch.arange(12).repeat_interleave(5))
    wanted = [100 * recall(ranks)[f"text_to_image_r@{k}"] for k in (1, 5, 10)]
    assert recipe["found"](ranks).mean(dim=0).tolist() == pytest.approx([*wanted, sum(wanted) / 3])


def test_a_difference_is_told_in_points() -> None:
    assert recipe["told"](Difference(value=-0.25, low=-1.0, high=0.52, p=0.4, count=9)) == "-0.2, -1.0 to +0.5"
