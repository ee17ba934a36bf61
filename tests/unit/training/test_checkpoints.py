"""Checkpoints: they come back bit for bit, a damaged one is passed over, and old ones make room."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from limner.errors import RunError
from limner.training import checkpoints
from limner.training.average import WeightAverage
from limner.training.checkpoints import BEST, FACTS, TENSORS, load_newest, numbered, prune

State = tuple[nn.Module, WeightAverage, torch.optim.Optimizer]


def state(seed: int, steps: int = 0) -> State:
    """A network with its average and optimiser after some steps."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    average = WeightAverage(network, 10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for step in range(steps):
        network(torch.randn(4, 2, 3, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(4, 4 * (step + 1))
    return network, average, optimizer


def tensors(network: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Everything that a training goes on with."""
    states = optimizer.state_dict()["state"]
    inner = [states[number][name] for number in sorted(states) for name in sorted(states[number])]
    return [*network.state_dict().values(), *average.averages, *inner]


def same(one: State, other: State) -> bool:
    """Whether two trainings stand at the same point, bit for bit."""
    pairs = list(zip(tensors(*one), tensors(*other), strict=True))
    return all(torch.equal(a, b) for a, b in pairs)


def save(folder: Path, images: int, *, seed: int | None = None) -> State:
    """A checkpoint after `images`, and what is in it."""
    saved = state(images if seed is None else seed, steps=2)
    checkpoints.save(folder / f"{images:09d}", *saved, {"images": images, "best": 0.25})
    return saved


def damage(file: Path, how: str) -> None:
    """Spoil a file of a checkpoint as a disk or a person might."""
    content = file.read_bytes()
    match how:
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "another's":
            network = nn.Linear(2, 2)
            average = WeightAverage(network, 1)
            checkpoints.save(file.parent, network, average, torch.optim.AdamW(network.parameters()), {"images": 1})


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved, other = save(tmp_path, 8), state(1)
    assert load_newest(tmp_path, *other) == {"images": 8, "best": 0.25}
    assert same(saved, other)
    for training in (saved, other):  # and goes on alike
        torch.manual_seed(5)
        training[0](torch.randn(4, 2, 3, 3)).square().sum().backward()
        training[2].step()
    assert same(saved, other)
    assert {p.name for p in (tmp_path / "000000008").iterdir()} == {TENSORS, FACTS}


def test_without_checkpoints_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "missing", *state(0)) is None


@pytest.mark.parametrize("name", [TENSORS, FACTS])
@pytest.mark.parametrize("how", ["gone", "empty", "cut", "another's"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    saved = save(tmp_path, 8)
    save(tmp_path, 16)
    damage(tmp_path / "000000016" / name, how)
    other = state(1)
    with caplog.at_level(logging.WARNING):
        facts = load_newest(tmp_path, *other)
    assert facts is not None
    assert facts["images"] == 8
    assert same(saved, other)
    assert [r.getMessage() for r in caplog.records if "000000016 is damaged" in r.getMessage()]


def test_when_all_are_damaged_the_user_is_told(tmp_path: Path) -> None:
    for images in (8, 16):
        save(tmp_path, images)
        damage(tmp_path / f"{images:09d}" / TENSORS, "cut")
    with pytest.raises(RunError, match=r"Every checkpoint .* is damaged; delete that folder") as caught:
        load_newest(tmp_path, *state(0))
    assert "\n" not in str(caught.value)


def names(folder: Path) -> list[str]:
    """What lies in a folder, hidden things too."""
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    best: Any = None
    for images in (8, 16, 24, 1_000_000_000):  # the last name is longer than the others
        saved = save(tmp_path, images)
        is_best = images in (8, 16)
        best = saved if is_best else best
        prune(tmp_path, 2, best=numbered(tmp_path)[-1] if is_best else None)
    assert names(tmp_path) == ["000000024", "1000000000", BEST]
    (tmp_path / "only").mkdir()
    (tmp_path / BEST).rename(tmp_path / "only" / "1")
    other = state(1)
    assert load_newest(tmp_path / "only", *other) == {"images": 16, "best": 0.25}
    assert same(best, other)


def test_the_best_is_no_second_copy_on_disk(tmp_path: Path) -> None:
    save(tmp_path, 8)
    prune(tmp_path, 2, best=tmp_path / "000000008")
    assert (tmp_path / BEST / TENSORS).samefile(tmp_path / "000000008" / TENSORS)
