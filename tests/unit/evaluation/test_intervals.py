"""Intervals hold the truth as often as they say, and tests find chance where there is only chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from limner.evaluation import intervals, scores
from limner.evaluation.distances import cmmd, cmmd_rest, frechet_of, kernel_distance, kernel_rest
from limner.evaluation.intervals import Interval, mean_interval, paired_difference, paired_set_difference, set_intervals


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def interval_of(statistic: Callable[[Tensor, Tensor], float], real: Tensor, fake: Tensor, resamples: int) -> Interval:
    return set_intervals(lambda one, other: {"it": statistic(one, other)}, real, fake, resamples)["it"]


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    values = normal(200, seed=0).exp()
    found = mean_interval(values, resamples=4000)
    theirs = stats.bootstrap(
        (values.double().numpy(),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.value == pytest.approx(values.double().mean().item())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert found.count == 200


def test_the_interval_of_a_mean_holds_the_truth_about_as_often_as_it_says() -> None:
    found = [mean_interval(normal(60, seed=seed), resamples=300, seed=seed) for seed in range(200)]
    held = sum(interval.low <= 0 <= interval.high for interval in found)
    assert 0.88 <= held / 200 <= 0.99


def test_numbers_of_one_picture_are_drawn_together() -> None:
    values, owners = normal(60, seed=0), torch.arange(60).repeat_interleave(4)
    once, four_times = mean_interval(values), mean_interval(values.repeat_interleave(4), owners)
    assert vars(four_times) == pytest.approx(vars(once))
    assert four_times.count == 60
    uneven = torch.cat([owners, torch.zeros(10, dtype=torch.long)])
    numbers = normal(250, seed=1)
    assert mean_interval(numbers, uneven).value == pytest.approx(numbers.double().mean().item())
    assert scores.share(torch.ones(240), owners).low == scores.share(torch.ones(60)).low


def simulated(
    pictures: int, seed: int, *, per: int = 5, share: float = 0.4, agree: bool = True
) -> tuple[Tensor, Tensor]:
    """Numbers (M,), of which `share` are 1 in truth and the others 0, and their pictures; those of one picture agree,
    or are independent.
    """
    rng = np.random.default_rng(seed)
    hits = np.repeat(rng.random(pictures) < share, per) if agree else rng.random(pictures * per) < share
    return torch.from_numpy(hits).double(), torch.arange(pictures).repeat_interleave(per)


def width(interval: Interval) -> float:
    """From end to end."""
    return interval.high - interval.low


@pytest.mark.parametrize("agree", [True, False])
def test_intervals_of_shares_hold_the_truth_as_often_as_they_say(agree: bool) -> None:
    found = [mean_interval(*simulated(150, seed, agree=agree), resamples=200, seed=seed) for seed in range(200)]
    assert 0.91 < np.mean([interval.low <= 0.4 <= interval.high for interval in found]) < 0.985


def test_intervals_shrink_with_the_root_of_the_number_of_pictures() -> None:
    few, many = (mean_interval(*simulated(count, 0), resamples=2000) for count in (100, 1600))
    assert 3.4 < width(few) / width(many) < 4.6


@pytest.mark.parametrize(("agree", "ratio"), [(True, 5**0.5), (False, 1.0)])
def test_numbers_that_agree_count_as_one(agree: bool, ratio: float) -> None:
    """Drawing them one by one, as if each had a picture of its own, would promise too much."""
    hits, owners = simulated(400, 1, agree=agree)
    clustered, naively = (mean_interval(hits, of, resamples=2000) for of in (owners, None))
    assert width(clustered) / width(naively) == pytest.approx(ratio, rel=0.12)


def test_an_interval_holds_its_value_where_hardly_any_part_differs() -> None:
    odd = iter([0.0] + [1.0] + [0.0] * 199)  # the whole first
    found = set_intervals(lambda *_: {"recall": next(odd)}, torch.zeros(8, 1), torch.zeros(8, 1), resamples=200)
    assert found["recall"].low <= found["recall"].value <= found["recall"].high


def test_a_few_pictures_beside_many_photographs_have_intervals() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "MOST", 10)
        found = scores.fidelity(normal(100, 5, seed=0), normal(8, 5, seed=1))
        assert scores.fidelity(normal(100, 5, seed=0), normal(4, 5, seed=1)).keys() == scores.DISTANCES.keys()
    assert all(one.low <= one.value <= one.high for one in found.values())
    assert set(found) == {*scores.DISTANCES, *scores.SHARED}


def test_the_interval_of_a_distance_is_as_wide_as_distances_of_other_pictures_stray() -> None:
    pairs = [(normal(100, 4, seed=seed), normal(100, 4, seed=1000 + seed) + 1) for seed in range(60)]
    strays = np.std([frechet_of(real, fake) for real, fake in pairs])
    found = interval_of(frechet_of, *pairs[0], resamples=100)
    assert found.low < found.value < found.high
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(strays, rel=0.4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "MOST", 30)
        fewer = interval_of(frechet_of, *pairs[0], resamples=100)
    assert fewer.value == found.value
    assert fewer != found
    assert (fewer.high - fewer.low) / (2 * 1.96) == pytest.approx(strays, rel=0.4)


def test_real_against_real_is_nothing_within_its_interval() -> None:
    found = [
        interval_of(kernel_distance, normal(80, 5, seed=seed), normal(80, 5, seed=seed + 500), resamples=50)
        for seed in range(40)
    ]
    assert sum(interval.low <= 0 <= interval.high for interval in found) >= 36


def test_a_paired_difference_is_found_where_unpaired_would_not() -> None:
    prompts = 5 * normal(100, seed=0)
    better, worse = prompts + 0.4 + 0.5 * normal(100, seed=1), prompts + 0.5 * normal(100, seed=2)
    found = paired_difference(better, worse)
    assert found.low > 0
    assert found.p < 0.01
    assert found.value == pytest.approx((better - worse).double().mean().item())
    back = paired_difference(worse, better)
    assert (back.value, back.low) == pytest.approx((-found.value, -found.high))
    assert paired_difference(worse, worse).p == 1


def test_chance_is_called_significant_as_often_as_it_should() -> None:
    found = [
        paired_difference(normal(30, seed=seed), normal(30, seed=seed + 999), resamples=199, seed=seed).p
        for seed in range(300)
    ]
    assert sum(p <= 0.1 for p in found) / 300 == pytest.approx(0.1, abs=0.055)


def test_a_difference_of_distances_is_found_on_the_same_prompts() -> None:
    real, one = normal(80, 4, seed=0), normal(80, 4, seed=1)
    worse, alike = one + 0.6, one + 0.05 * normal(80, 4, seed=2)
    found = paired_set_difference(frechet_of, real, worse, one, resamples=60)
    assert found.low > 0
    assert found.p < 0.05
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "MOST", 60)
        fewer = paired_set_difference(frechet_of, real, worse, one, resamples=60)
    assert (fewer.value, fewer.count) == (found.value, found.count)
    assert fewer.low > 0
    assert fewer.p < 0.05
    same = paired_set_difference(frechet_of, real, alike, one, resamples=60)
    assert same.low < 0 < same.high
    assert same.p > 0.05


@pytest.mark.parametrize(("whole", "rest"), [(kernel_distance, kernel_rest), (cmmd, cmmd_rest)])
def test_what_photographs_are_alone_tells_nothing_of_a_difference(
    whole: Callable[[Tensor, Tensor], float], rest: Callable[[Tensor, Tensor], float]
) -> None:
    sets = [torch.nn.functional.normalize(normal(30, 4, seed=seed) + seed / 5, dim=1) for seed in range(3)]
    found, shorter = (paired_set_difference(statistic, *sets, resamples=30) for statistic in (whole, rest))
    assert vars(shorter) == pytest.approx(vars(found), abs=1e-9)


def test_no_test_looks_at_more_photographs_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def statistic(real: Tensor, fake: Tensor) -> float:
        seen.append(len(real))
        return (real.mean() - fake.mean()).abs().item()

    monkeypatch.setattr(intervals, "MOST", 20)
    paired_set_difference(statistic, normal(90, 2, seed=0), normal(15, 2, seed=1), normal(15, 2, seed=2), resamples=5)
    assert sorted(set(seen)) == [20, 24, 90], "the parts of a test, those of an interval, and all once"


def test_the_same_seed_gives_the_same_interval() -> None:
    values = normal(20, seed=0)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values, seed=1) != mean_interval(values)
