"""Distances of sets of features against torch-fidelity, closed forms, and loops over all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, normalize

import fidelity
from limner.evaluation import distances
from limner.evaluation.distances import (
    Coverage,
    Moments,
    cmmd,
    frechet,
    frechet_of,
    kernel_distance,
    precision_recall,
)


def gaussian(count: int, seed: int, width: int = 6) -> Tensor:
    """Features of a Gaussian of its own mean and covariance (count, width)."""
    generator = torch.Generator().manual_seed(seed)
    mix, mean = torch.randn(width, width, generator=generator), torch.randn(width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mix + mean


def features(count: int, seed: int, width: int = 6) -> Tensor:
    """Random features of unit length (count, width)."""
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=30)
def test_moments_are_those_of_numpy_in_parts_of_any_size(sizes: list[int], seed: int) -> None:
    rows = gaussian(sum(sizes) + 2, seed) + 1000  # a mean far from 0 is where sums of squares lose their digits
    moments = Moments(6)
    for part in rows.split([*sizes, 2]):
        moments.update(part)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.double().mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.double().numpy(), rowvar=False), atol=1e-9)


def test_moments_take_no_more_memory_for_more_features() -> None:
    moments, held = Moments(8), []
    for seed in range(10):
        moments.update(gaussian(1_000, seed, 8))
        held.append(sum(value.nbytes for value in vars(moments).values() if isinstance(value, Tensor)))
    assert moments.count == 10_000
    assert set(held) == {8 * (8 + 64)}


@pytest.mark.parametrize("shape", [(300, 200, 8), (40, 60, 64)], ids=["many", "few"])
def test_the_frechet_distance_is_that_of_torch_fidelity(shape: tuple[int, int, int]) -> None:
    metric_fid = fidelity.part("metric_fid")
    one, other = gaussian(shape[0], 0, shape[2]).double(), gaussian(shape[1], 1, shape[2]).double()
    statistics = [metric_fid.fid_features_to_statistics(x) for x in (one, other)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet(Moments.of(one), Moments.of(other)) == pytest.approx(theirs, rel=1e-6, abs=1e-4)
    assert frechet_of(one, other) == pytest.approx(theirs, rel=1e-6, abs=1e-4)


def test_the_frechet_distance_of_gaussians_on_the_axes_is_known() -> None:
    """Covariances that commute: the sum of squared differences of means and of deviations."""
    means, deviations = torch.tensor([[0.0, 1.0, 5.0], [3.0, 1.0, 4.0]]), torch.tensor([[1.0, 2.0, 0.5], [2.0, 2.0, 3]])
    moments = []
    for mean, deviation in zip(means.double(), deviations.double()):
        known = Moments(3)
        known.count, known.mean, known.scatter = 11, mean, torch.diag(deviation**2) * 10
        moments.append(known)
    wanted = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet(*moments) == pytest.approx(wanted.item(), abs=1e-9)


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=40)
def test_both_ways_to_the_frechet_distance_agree(n: int, m: int, width: int, seed: int) -> None:
    one, other = gaussian(n, seed, width), gaussian(m, seed + 1, width)
    wanted = frechet(Moments.of(one), Moments.of(other))
    assert frechet_of(one, other) == pytest.approx(wanted, abs=1e-5 * (1 + wanted))
    assert frechet_of(one, one) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("width", [8, 64])
def test_the_kernel_distance_is_that_of_torch_fidelity(width: int) -> None:
    """Of one subset that is the whole, and close to the mean of many smaller ones."""
    metric_kid = fidelity.part("metric_kid")
    one, other = gaussian(150, 0, width) / 4, gaussian(150, 1, width) / 4
    found = kernel_distance(one, other)
    theirs = metric_kid.kid_features_to_metric(
        one.double(), other.double(), kid_subsets=1, kid_subset_size=150, verbose=False
    )
    assert found == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6, abs=1e-4)
    many = metric_kid.kid_features_to_metric(
        one.double(), other.double(), kid_subsets=400, kid_subset_size=100, verbose=False
    )
    error = many["kernel_inception_distance_std"] / 20
    assert found == pytest.approx(many["kernel_inception_distance_mean"], abs=4 * error)


def cubature(mean: Tensor, root: Tensor) -> Tensor:
    """Points with the moments of a Gaussian of covariance root root^T up to the third: (D,), (D, D) -> (2D, D)."""
    steps = len(mean) ** 0.5 * root.T  # (D, D)
    return torch.cat([mean + steps, mean - steps])


def test_the_kernel_distance_of_gaussians_is_known() -> None:
    """The cubic kernel knows three moments alone. With u = x.y / D of x of N(m, S) and y of N(n, T),
    E[(u + 1)^3] = 1 + 3 E[u] + 3 E[u^2] + E[u^3].
    """
    width, generator = 4, torch.Generator().manual_seed(0)
    means = torch.randn(2, width, generator=generator, dtype=torch.double)
    roots = torch.randn(2, width, width, generator=generator, dtype=torch.double)

    def kernel(one: int, other: int) -> float:
        m, n, s, t = means[one], means[other], roots[one] @ roots[one].T, roots[other] @ roots[other].T
        u, spread = m @ n, (s @ t).trace()
        second = spread + m @ t @ m + n @ s @ n + u**2
        third = u**3 + 3 * u * (m @ t @ m + n @ s @ n + spread) + 6 * m @ t @ s @ n
        return float(1 + 3 * u / width + 3 * second / width**2 + third / width**3)

    points = [cubature(mean, root) for mean, root in zip(means, roots)]

    def without_own_pairs(number: int) -> float:
        count, own = 2 * width, (points[number].square().sum(dim=1) / width + 1).pow(3)
        return float((count * kernel(number, number) - own.mean()) / (count - 1))

    wanted = without_own_pairs(0) + without_own_pairs(1) - 2 * kernel(0, 1)
    assert kernel_distance(*points) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 99))
@settings(max_examples=30)
def test_the_kernel_distance_is_that_of_a_loop_over_all_pairs(n: int, m: int, seed: int) -> None:
    one, other = gaussian(n, seed).double(), gaussian(m, seed + 1).double()

    def mean(a: Tensor, b: Tensor) -> float:
        kernels = [
            (float(x @ y) / 6 + 1) ** 3 for i, x in enumerate(a) for j, y in enumerate(b) if a is not b or i != j
        ]
        return sum(kernels) / len(kernels)

    wanted = mean(one, one) + mean(other, other) - 2 * mean(one, other)
    assert kernel_distance(one, other) == pytest.approx(wanted, rel=1e-9, abs=1e-6)


def loop(one: Tensor, other: Tensor) -> float:
    """Mean kernel of CMMD of all pairs, one by one."""
    kernels = [math.exp(-sum((x - y) ** 2 for x, y in zip(a, b)) / 200) for a in one.tolist() for b in other.tolist()]
    return sum(kernels) / len(kernels)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=30)
def test_cmmd_is_that_of_a_loop_over_all_pairs(n: int, m: int, seed: int) -> None:
    one, other = features(n, seed), features(m, seed + 1)
    wanted = 1000 * (loop(one, one) + loop(other, other) - 2 * loop(one, other))
    assert cmmd(one, other) == pytest.approx(wanted, abs=1e-6)


def test_cmmd_of_more_features_than_a_block_holds() -> None:
    """Features that are repeated tell no more than they do once."""
    one, other = features(11, 0), features(7, 1)
    assert cmmd(one.repeat(200, 1), other.repeat(301, 1)) == pytest.approx(cmmd(one, other), abs=1e-6)


def test_cmmd_of_the_same_features_is_nothing_and_grows_with_distance() -> None:
    one = features(20, 0)
    assert cmmd(one, one) == 0
    away = [cmmd(one, normalize(one + torch.tensor([far, 0, 0, 0, 0, 0]), dim=1)) for far in (0.1, 0.3, 1, 3)]
    assert away == sorted(away)
    assert away[0] > 1e-3


def test_cmmd_of_two_opposite_features_is_known() -> None:
    one = torch.tensor([[1.0, 0.0]])
    assert cmmd(one, -one) == pytest.approx(2000 * (1 - math.exp(-4 / 200)))


def naive(real: Tensor, fake: Tensor, k: int) -> Coverage:
    """Every ball and every point, one by one."""

    def radius(rows: Tensor, i: int) -> float:
        return sorted(math.dist(rows[i].tolist(), row.tolist()) for j, row in enumerate(rows) if j != i)[k - 1]

    def inside(point: Tensor, rows: Tensor, i: int) -> bool:
        return math.dist(point.tolist(), rows[i].tolist()) <= radius(rows, i)

    balls = [[inside(f, real, i) for i in range(len(real))] for f in fake]
    recalled = [any(inside(r, fake, i) for i in range(len(fake))) for r in real]
    return Coverage(
        sum(any(row) for row in balls) / len(fake),
        sum(recalled) / len(real),
        sum(sum(row) for row in balls) / (k * len(fake)),
        sum(any(row[i] for row in balls) for i in range(len(real))) / len(real),
    )


@given(st.integers(4, 9), st.integers(4, 9), st.integers(1, 3), st.integers(0, 99), st.sampled_from([2, 1024]))
@settings(max_examples=30)
def test_precision_and_recall_are_those_of_loops(n: int, m: int, k: int, seed: int, block: int) -> None:
    real, fake = gaussian(n, seed, 2), gaussian(m, seed + 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "BLOCK", block)
        found = precision_recall(real, fake, k)
    assert vars(found) == pytest.approx(vars(naive(real, fake, k)))


def test_precision_and_recall_know_what_is_left_out() -> None:
    """Drawn pictures of one of two kinds of photographs are precise, and recall the half; so with the kinds changed."""
    generator = torch.Generator().manual_seed(0)
    near, far = torch.randn(200, 2, generator=generator), torch.randn(200, 2, generator=generator) + 50
    both, drawn = torch.cat([near, far]), torch.randn(400, 2, generator=generator)
    found, back = precision_recall(both, drawn), precision_recall(drawn, both)
    assert found.precision == back.recall > 0.95
    assert 0.45 < found.recall <= 0.5
    assert 0.45 < back.precision <= 0.5
    assert 0.45 < found.coverage <= 0.5
    assert found.density == pytest.approx(1, abs=0.25) or found.density > 1
    assert precision_recall(both, both) == Coverage(1, 1, pytest.approx(4 / 3), 1)


def pictures(count: int, seed: int) -> Tensor:
    """Blocks of colour and fine grain, (count, 3, 16, 16) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = interpolate(torch.rand(count, 3, 4, 4, generator=generator), (16, 16), mode="nearest")
    return (coarse + 0.3 * torch.rand(count, 3, 16, 16, generator=generator)) / 1.3 * 2 - 1


def seen(pixels: Tensor) -> Tensor:
    """What a random convolution sees: (N, 3, H, W) -> (N, 16)."""
    weight = torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(9))
    return torch.nn.functional.conv2d(pixels, weight).abs().mean(dim=(2, 3))


def harmed(drawn: Tensor, harm: str) -> list[Tensor]:
    """Pictures as they are, and worse and worse."""
    if harm == "blur":
        return [drawn] + [avg_pool2d(drawn, side, 1, side // 2, count_include_pad=False) for side in (3, 5, 7)]
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(2))
    return [drawn + level * noise for level in (0, 0.3, 0.4, 0.8)]


@pytest.mark.parametrize("measure", [frechet_of, kernel_distance, lambda a, b: cmmd(*(normalize(x) for x in (a, b)))])
@pytest.mark.parametrize("harm", ["blur", "noise"])
def test_distances_grow_with_harm(measure: object, harm: str) -> None:
    assert callable(measure)
    real, drawn = pictures(400, 0), pictures(400, 1)
    found = [measure(seen(real), seen(pixels)) for pixels in harmed(drawn, harm)]
    assert found == sorted(found)
    assert found[1] > 2 * abs(found[0]), "pictures of the same kind are near nothing"


@pytest.mark.parametrize("harm", ["blur", "noise"])
def test_what_is_shared_falls_with_harm(harm: str) -> None:
    real, drawn = pictures(400, 0), pictures(400, 1)
    found = [vars(precision_recall(seen(real), seen(pixels))) for pixels in harmed(drawn, harm)]
    for name in found[0]:
        values = [one[name] for one in found]
        assert values == sorted(values, reverse=True), name
        assert values[0] > 0.5 + values[-1], name
