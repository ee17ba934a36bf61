"""Parts of a batch learned side by side: the step of the whole batch, and the same bits each time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from limner.config import TrainClipConfig, TrainConfig, TrainUnetConfig
from limner.models import layers
from limner.training import lanes, optimizers, processes
from limner.training.lanes import LEAST, Lanes, lanes_for
from limner.training.task import place, step
from tiny import WIDTH, tiny_unet
from trainings import Summing, config


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As on a machine with two cores; the tests' own are one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Drawing(Summing):
    """A U-Net that learns to answer with its noise."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.network = tiny_unet()
        self.learned_by: set[str] = set()

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.learned_by.add(threading.current_thread().name)
        answer = network(batch["x"], 500, batch["states"]).sample
        errors = (answer - batch["x"]).square().mean(dim=(1, 2, 3))
        return errors.mean(), {"error": errors.mean(), "count": torch.tensor(float(len(errors)))}


def trained(count: int, images: int, steps: int, **values: Any) -> tuple[list[dict[str, Tensor]], Drawing]:
    """Figures of a few steps with so many lanes, and the task."""
    torch.manual_seed(0)
    given = config(TrainConfig, Path("nowhere"), Path("r"), **values)
    task, accelerator = Drawing(given), processes.join(None)
    place(task.network, accelerator)
    optimizer, side = optimizers.new(task.network, given, {}), Lanes(task.network, count)
    batch = {"x": torch.randn(images, 4, 8, 8), "states": torch.randn(images, 7, WIDTH)}
    settings = {"rate": 0.01, "seed": 0, "config": given, "accelerator": accelerator}
    return [step(task, side, optimizer, batch, **settings) for _ in range(steps)], task


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("values", [{}, {"micro_batch_size": 20}, {"precision": "bf16"}])
def test_lanes_make_the_steps_of_one(values: dict[str, Any]) -> None:
    """Each step from the weights that the one before it left, in all lanes."""
    one, whole = trained(1, 2 * LEAST + 5, 3, **values)
    two, parted = trained(2, 2 * LEAST + 5, 3, **values)
    again, repeated = trained(2, 2 * LEAST + 5, 3, **values)
    assert len(parted.learned_by) > len(whole.learned_by) == 1
    near = {"rtol": 0.05, "atol": 0.02} if values.get("precision") else {"rtol": 1e-3, "atol": 1e-4}
    for figures, others, same in zip(one, two, again, strict=True):
        assert list(figures) == list(others)
        assert figures["count"] > others["count"] > 0
        for name in ("loss", "error", "gradient"):
            assert_close(figures[name], others[name], **near)
        assert others == same, "to the last bit"
    for weight, other, same in zip(*(task.network.parameters() for task in (whole, parted, repeated)), strict=True):
        assert_close(weight, other, **near)
        assert torch.equal(other, same)
        assert other.grad is None


@given(st.integers(1, 200), st.integers(1, 8))
def test_parts_are_the_whole_and_worth_a_lane(images: int, count: int) -> None:
    parts = Lanes(nn.Linear(1, 1), count).parts(images)
    assert [image for part in parts for image in range(images)[part]] == list(range(images))
    assert len(parts) <= count
    assert len(parts) == 1 or min(part.stop - part.start for part in parts) >= LEAST


@pytest.mark.usefixtures("two_threads")
def test_a_failure_in_a_lane_is_raised_when_all_have_ended() -> None:
    ended = threading.Event()

    def act(network: nn.Module, part: slice) -> None:
        if part.start == 0:
            raise ValueError("this one")
        ended.wait(0.2)
        ended.set()

    with pytest.raises(ValueError, match="this one"):
        Lanes(nn.Linear(1, 1), 2).learn(act, [slice(0, 8), slice(8, 16)])
    assert ended.is_set()


@pytest.mark.usefixtures("two_threads")
def test_lanes_are_for_small_networks_whose_images_are_learned_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(network: nn.Module, cls: type[TrainConfig] = TrainUnetConfig, **values: Any) -> int:
        alone = {"device": torch.device("cpu"), "num_processes": 1}
        accelerator: Any = SimpleNamespace(**{name: values.pop(name, value) for name, value in alone.items()})
        return lanes_for(network, config(cls, Path("nowhere"), Path("r"), **values), accelerator)

    small = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0))
    assert found(small) == 2
    assert found(small, num_processes=2) == found(small, device=torch.device("cuda")) == found(small, compile=True) == 1
    assert found(small, TrainClipConfig) == 1
    layers.drop_out(small, 0.1)
    assert found(small) == 2
    assert found(nn.Sequential(small, nn.Dropout(0.1))) == found(nn.Sequential(small, nn.BatchNorm2d(4))) == 1
    monkeypatch.setattr(lanes, "SMALL", 19)
    assert found(small) == 1
