"""The weight average against a loop over plain numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from limner.training.average import RAMP, WeightAverage


def trained(halflife: float, steps: int, batch: int = 4) -> tuple[nn.Module, WeightAverage, list[float]]:
    """A network whose weights jump about, its average, and one weight's values from the beginning on."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 2)).to(memory_format=torch.channels_last)
    average = WeightAverage(network, halflife)
    values = [network[1].weight[1, 2].item()]
    for step in range(steps):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_()
        average.update(batch, (step + 1) * batch)
        values.append(network[1].weight[1, 2].item())
    return network, average, values


@pytest.mark.parametrize("halflife", [0.5, 3.0, 100.0])
def test_it_halves_what_is_a_halflife_ago(halflife: float) -> None:
    network, average, values = trained(halflife, 60)
    wanted = values[0]
    for step, value in enumerate(values[1:], start=1):
        keep = 0.5 ** (4 / min(halflife, step * 4 * RAMP))
        wanted = keep * wanted + (1 - keep) * value
    with average.applied():
        assert_close(network[1].weight[1, 2].item(), wanted, rtol=1e-5, atol=1e-6)


def test_halflife_0_follows_the_weights() -> None:
    network, average, _ = trained(0, 3)
    assert all(map(torch.equal, average.averages, network.parameters()))


def test_the_weights_come_back_after_use_even_after_an_error() -> None:
    network, average, _ = trained(50, 3)
    before = [p.clone() for p in network.parameters()]
    with pytest.raises(ValueError, match="x"), average.applied():
        assert not any(map(torch.equal, before, network.parameters()))
        raise ValueError("x")
    assert all(map(torch.equal, before, network.parameters()))


def test_it_survives_a_checkpoint() -> None:
    _, average, _ = trained(50, 3)
    other = WeightAverage(trained(50, 0)[0], 50)
    for name, tensor in other.state().items():
        tensor.copy_(average.state()[name])
    assert all(map(torch.equal, average.averages, other.averages))


def test_frozen_parameters_are_not_averaged() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 2))
    network[0].requires_grad_(False)
    average = WeightAverage(network, 0)
    assert [tuple(tensor.shape) for tensor in average.state().values()] == [(2, 4), (2,)]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(2.0)
    with average.applied():
        assert all((p == 2).all() for p in network[0].parameters())
        assert not any((p == 2).all() for p in network[1].parameters())
