"""What `--auto` finds, that it leaves the training alone, and that it searches once."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import operator
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from limner.artifacts import read_json
from limner.config import TrainConfig
from limner.errors import ConfigError, RunError
from limner.settings import resolve
from limner.training import processes
from limner.training.auto import chosen_rate, doubled, find_batch_size, find_rate, range_test, timed
from limner.training.loop import plan_training, run_training
from limner.training.stream import Stream
from trainings import Summing, config, run_summing, weights


def settings(out: Path, **given: Any) -> TrainConfig:
    """A training that is to find batch size and learning rate, but for what is given."""
    return config(TrainConfig, Path("nowhere"), out, **{"auto": True, "batch_size": None, "lr": None, **given})


class Noting:
    """Builds `Summing`, and notes with what batch sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, config: TrainConfig) -> Summing:
        self.sizes.append(config.batch_size)
        return Summing(config)


# ---- the batch size


RISES = st.lists(st.sampled_from([0.5, 1.0, 1.04, 1.06, 2.0]), min_size=6, max_size=6)


SHORTAGES = (
    torch.OutOfMemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 1 bytes."),
    MemoryError(),
)


@given(st.integers(1, 300), RISES, st.integers(0, 6), st.sampled_from(SHORTAGES))
def test_doubling_goes_on_while_it_pays_and_memory_suffices(
    most: int, rises: list[float], room: int, shortage: Exception
) -> None:
    paces = list(itertools.accumulate(rises, operator.mul, initial=9.0))
    tried: list[int] = []

    def pace(size: int) -> float:
        tried.append(size)
        if len(tried) > room:
            raise shortage
        return paces[len(tried) - 1]

    if room == 0:
        with pytest.raises(ConfigError, match=f"not suffice for {min(8, most)} images a step; give a smaller"):
            doubled(pace, most)
        return
    found = doubled(pace, most)
    assert tried == [min(8, most) * 2**k for k in range(len(tried))]
    assert max(tried) <= most
    taken = tried.index(found)
    assert all(rise > 1.05 for rise in rises[:taken])
    assert 2 * found > most or taken + 1 == room or rises[taken] < 1.05


class Hasty(Summing):
    """The more images there are the less time they take."""

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        time.sleep(16 / len(batch["x"]) ** 2)
        return super().loss(network, batch)


@pytest.mark.parametrize(("length", "images", "wanted"), [(40, 1_000, 32), (1_000, 20, 16), (5, 1_000, 5)])
def test_the_batch_is_no_more_than_there_is(length: int, images: int, wanted: int) -> None:
    given = settings(Path("nowhere"), images=images)
    task = Hasty(given)
    task.stream = Stream(length, 0, task._example)
    assert find_batch_size(task, given, processes.join(None)) == wanted


class Holding(Summing):
    """A step holds 1 MB an image until its gradients are there."""

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = super().loss(network, batch)
        held = torch.ones(len(batch["x"]), 250_000)
        return loss + 0 * (loss * held).mean(), figures


def first_without_room(room: int) -> int:
    """The size of a batch of `Holding` at which doubling it ends, with room for so many bytes."""
    given = settings(Path("nowhere"))
    pace = timed(Holding(given), given, processes.join(None), room=room)
    size = 8
    with pytest.raises(torch.OutOfMemoryError):
        while size <= 512:
            pace(size)
            size *= 2
    return size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_batch_has_room_in_memory() -> None:
    """In a process of its own, which has needed no memory before; a step takes some more than the 1 MB it holds."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        small, large = (pool.submit(first_without_room, room * 10**6).result() for room in (30, 240))
    assert small <= 32
    assert 2 * small < large <= 256


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_search_for_a_batch_size_moves_no_weight(tmp_path: Path, optimizer: str) -> None:
    given = settings(tmp_path / "r", optimizer=optimizer, weight_decay=0.5)
    task = Summing(given)
    before = {name: p.detach().clone() for name, p in task.network.named_parameters()}
    find_batch_size(task, given, processes.join(None))
    assert all(torch.equal(p, before[name]) for name, p in task.network.named_parameters())


# ---- the learning rate


@given(st.floats(math.log(25), math.log(1e5)).map(math.exp), st.floats(0.1, 1))
def test_the_rate_for_a_quadratic_is_stable_and_not_far_below(curvature: float, share: float) -> None:
    """Descent on half w'Hw, with two curvatures, is stable up to 2 over the greater one."""
    curvatures = torch.tensor([curvature, share * curvature], dtype=torch.float64)
    w = torch.ones(2, dtype=torch.float64)

    def loss_after(rate: float) -> float:
        w.sub_(rate * curvatures * w)
        return (curvatures * w.square()).sum().item() / 2

    found = chosen_rate(*range_test(loss_after))
    assert 0.1 < found / (2 / curvature) < 1


def test_the_range_test_ends_where_the_loss_diverges() -> None:
    def loss_after(rate: float) -> float:
        tried.append(rate)
        return next(losses)

    for end in (4.1, math.inf, math.nan):
        tried: list[float] = []
        losses = iter([2.0, 1.0, 3.9, 1.5, end])
        rates, kept = range_test(loss_after)
        assert kept == [2.0, 1.0, 3.9, 1.5]
        assert tried[:4] == rates
        assert len(tried) == 5
    rates, kept = range_test(lambda rate: 1.0)
    assert (rates[0], rates[-1], len(rates)) == (pytest.approx(1e-6), pytest.approx(1e-1), 60)
    steps = [after / before for before, after in itertools.pairwise(rates)]
    assert steps == pytest.approx([steps[0]] * 59)


@pytest.mark.parametrize("losses", [[], [1.0, 0.5, 0.2], [1.0] * 60, [1.0 + k / 100 for k in range(60)]])
def test_where_no_rate_helps_the_user_is_told(losses: list[float]) -> None:
    with pytest.raises(ConfigError, match="no learning rate at which the loss falls; give lr"):
        chosen_rate([1e-6 * 1.2**k for k in range(len(losses))], losses)


def test_the_rate_is_a_third_of_where_the_loss_falls_fastest() -> None:
    """A loss that halves with each step from the 20th to the 30th, and is level elsewhere."""
    rates = torch.logspace(-6, -1, 60, dtype=torch.float64).tolist()
    losses = [2.0 ** -min(max(step - 20, 0), 10) for step in range(60)]
    assert rates[20] < 3 * chosen_rate(rates, losses) < rates[30]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_rate_for_a_network_trains_it(tmp_path: Path, optimizer: str, seed: int) -> None:
    given = settings(tmp_path / "r", seed=seed, optimizer=optimizer, batch_size=8)
    rate = find_rate(Summing(given), given, processes.join(None))
    assert 1e-3 < rate < 0.05
    run = run_summing(settings(tmp_path / "r", auto=False, seed=seed, lr=rate, batch_size=8, images=400))
    first = read_json(
        run_summing(settings(tmp_path / "b", auto=False, seed=seed, lr=1e-9, batch_size=8)) / "manifest.json"
    )
    assert read_json(run / "manifest.json")["validation"]["loss"] < first["validation"]["loss"] / 3


# ---- a run


def test_a_run_is_the_one_with_the_numbers_that_were_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_summing(settings(tmp_path / "r"))
    stored = read_json(run / "config.json")
    said = capsys.readouterr().out
    assert f"auto found batch_size {stored['batch_size']} and lr {stored['lr']:g}\n" in said
    assert stored["batch_size"] in (8, 16)
    assert stored["auto"] is False
    numbers = {name: stored[name] for name in ("batch_size", "lr")}
    given = run_summing(settings(tmp_path / "given", auto=False, **numbers))
    again = run_summing(resolve(TrainConfig, {"out": tmp_path / "again"}, file=run / "config.json"))
    assert weights(run) == weights(given) == weights(again)
    assert "auto found" not in capsys.readouterr().out


def test_the_same_command_takes_what_was_found_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = Noting()
    run_training(make, settings(tmp_path / "r"))
    stored = read_json(tmp_path / "r" / "config.json")
    size = stored["batch_size"]
    assert make.sizes == [8, size, size], "to find the one, to find the other with it, to train"
    run_training(make, settings(tmp_path / "r"))
    assert "Nothing to do" in capsys.readouterr().out
    run_training(make, settings(tmp_path / "r", images=48))
    assert make.sizes == [8, size, size, size, size]
    assert read_json(tmp_path / "r" / "config.json") == {**stored, "images": 48}
    with pytest.raises(RunError, match=r"other settings \(lr\)"):
        run_training(make, settings(tmp_path / "r", lr=0.123))


@pytest.mark.parametrize("given", [{"lr": 0.004}, {"batch_size": 4}])
def test_what_is_given_stays(tmp_path: Path, given: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    run = run_summing(settings(tmp_path / "r", **given))
    stored = read_json(run / "config.json")
    (other,) = {"batch_size", "lr"} - set(given)
    assert capsys.readouterr().out.startswith(f"auto found {other} {stored[other]:g}\n")
    assert {name: stored[name] for name in given} == given
    assert stored[other] != TrainConfig.model_fields[other].default


def test_with_both_given_there_is_nothing_to_find(tmp_path: Path) -> None:
    for call in (run_training, plan_training):
        with pytest.raises(ConfigError, match="auto has nothing to find"):
            call(Summing, settings(tmp_path / "r", lr=0.1, batch_size=8))
    assert list(tmp_path.iterdir()) == []


def test_a_plan_finds_and_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_training(Summing, settings(tmp_path / "r", batch_size=4))
    assert capsys.readouterr().out.startswith("auto found lr ")
    assert plan["steps"] == "8 of 4 images"
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_was_killed_is_begun_again(tmp_path: Path) -> None:
    """Nothing is written before it has ended, so that no number is taken that was not found."""

    class Stopped(Summing):
        def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(Stopped, settings(tmp_path / "r"))
    assert list(tmp_path.iterdir()) == []
