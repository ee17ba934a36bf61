"""Copies are found among pictures, by pixels and by features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limner.evaluation import copies as module
from limner.evaluation.copies import Nearest, copies, nearest, thumbnails


def pictures(count: int, seed: int) -> Tensor:
    """Smooth pictures (count, 3, 64, 64) in [-1, 1]."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(-1, 1)


def test_the_nearest_is_that_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 3)
    some, training = torch.rand(10, 4), torch.rand(30, 4)
    found = nearest(some.split(4), training)
    distances = (some[:, None] - training).norm(dim=2)
    assert found.distances.tolist() == pytest.approx(distances.min(dim=1).values.tolist())
    assert found.owners.tolist() == distances.argmin(dim=1).tolist()


def test_training_photographs_are_copies_also_larger_noised_and_mirrored() -> None:
    """And photographs of other scenes are not, but for one in a thousand of those that the threshold is from."""
    training, real = pictures(300, 0), pictures(1000, 1)
    thumbs = thumbnails(training)
    sides = {"training": thumbs, "mirrored": thumbnails(training.flip(-1))}
    baseline = nearest([thumbnails(real)], **sides)
    noised = training + 0.05 * torch.randn(training.shape, generator=torch.Generator().manual_seed(2))
    larger = torch.nn.functional.interpolate(training, (96, 96), mode="bicubic")
    for given in (training, training.flip(-1), noised, larger):
        found = nearest([thumbnails(given)], **sides)
        assert copies(found, baseline).share >= 0.99
        assert found.owners.tolist() == list(range(300))
    assert copies(nearest([thumbnails(pictures(500, 3))], **sides), baseline).share <= 0.01
    assert copies(baseline, baseline).share == pytest.approx(1 / 1000)


def test_without_the_mirrored_photographs_their_pictures_pass() -> None:
    training, real = pictures(50, 0), pictures(1000, 1)
    baseline = nearest([thumbnails(real)], thumbnails(training))
    assert copies(nearest([thumbnails(training.flip(-1))], thumbnails(training)), baseline).share < 0.1


def test_the_threshold_is_nearer_than_999_in_1000() -> None:
    real = Nearest(torch.arange(1, 2001).float(), torch.zeros(2000, dtype=torch.long))
    found = copies(Nearest(torch.tensor([0.0, 2, 2.9, 3, 50]), torch.zeros(5, dtype=torch.long)), real)
    assert found.threshold == 3
    assert found.flagged.tolist() == [True, True, True, False, False]
    assert found.share == 0.6


def test_a_picture_that_is_a_photograph_is_a_copy_whatever_the_test_photographs_are() -> None:
    real = Nearest(torch.zeros(1000), torch.zeros(1000, dtype=torch.long))
    assert copies(Nearest(torch.tensor([0.0, 0.1]), torch.tensor([0, 1])), real).flagged.tolist() == [True, False]
