"""Checkpoints: they come back bit for bit, hold what is trained, a damaged one is passed over, old ones make room."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from limner.config import TrainConfig
from limner.errors import RunError
from limner.training import checkpoints, optimizers
from limner.training.average import WeightAverage
from limner.training.checkpoints import BEST, FACTS, NEWEST, TENSORS, Facts, load_best, load_newest, tidy
from trainings import config

State = tuple[nn.Module, WeightAverage, torch.optim.Optimizer]


def state(seed: int, steps: int = 0) -> State:
    """A network with its average and optimiser after some steps."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    average = WeightAverage(network, 10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
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


def facts(images: int, *, best_at: int = 1) -> Facts:
    """Those of a training that was at its best after `best_at` images."""
    return Facts(images, {"loss": 0.5}, best=0.25, best_at=best_at, stale=3)


def save(folder: Path, images: int, *, best_at: int = 1, keep: int = 9) -> State:
    """A checkpoint after `images`, and what is in it."""
    saved = state(images, steps=2)
    checkpoints.save(folder, keep, *saved, facts(images, best_at=best_at))
    return saved


def damage(file: Path, how: str) -> None:
    """Spoil a file of a checkpoint as a disk or a person might."""
    content = file.read_bytes()
    match how:
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "one bit":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "another's":
            network = nn.Linear(2, 2)
            average = WeightAverage(network, 1)
            optimizer = torch.optim.AdamW(network.parameters())
            checkpoints.save(file.parents[1] / "other", 1, network, average, optimizer, Facts(1))
            (file.parents[1] / "other" / "000000001" / file.name).replace(file)
            shutil.rmtree(file.parents[1] / "other")
        case "of another time":
            file.write_text('{"pictures": 16}')


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved, other = save(tmp_path, 8), state(1)
    assert load_newest(tmp_path, *other) == facts(8)
    assert same(saved, other)
    for training in (saved, other):  # and goes on alike
        torch.manual_seed(5)
        training[0](torch.randn(4, 2, 3, 3)).square().sum().backward()
        training[2].step()
    assert same(saved, other)
    assert {p.name for p in (tmp_path / "000000008").iterdir()} == {TENSORS, FACTS}


def test_without_checkpoints_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "missing", *state(0)) == Facts()
    tidy(tmp_path / "missing", 1, Facts())
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in (TENSORS, FACTS) for how in ("gone", "empty", "cut")]
    + [(TENSORS, "one bit"), (TENSORS, "another's"), (FACTS, "of another time")],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    saved = save(tmp_path, 8)
    save(tmp_path, 16)
    damage(tmp_path / "000000016" / name, how)
    other = state(1)
    with caplog.at_level(logging.WARNING):
        assert load_newest(tmp_path, *other) == facts(8)
    assert same(saved, other)
    assert [r.getMessage() for r in caplog.records if "000000016 is damaged" in r.getMessage()]


def test_where_the_newest_is_gone_that_is_said_and_the_one_before_it_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = save(tmp_path, 8)
    save(tmp_path, 16)
    assert load_newest(tmp_path, *state(1)) == facts(16)
    assert caplog.messages == []
    shutil.rmtree(tmp_path / "000000016")
    other = state(1)
    assert load_newest(tmp_path, *other) == facts(8)
    assert same(saved, other)
    assert [message for message in caplog.messages if "000000016 is gone" in message]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "I/O"), torch.OutOfMemoryError])
def test_what_hinders_reading_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | type[Exception]
) -> None:
    def hindered(_: Path) -> NoReturn:
        raise error

    save(tmp_path, 8, best_at=8)
    monkeypatch.setattr(checkpoints, "load_file", hindered)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        load_newest(tmp_path, *state(0))
    with pytest.raises(error if isinstance(error, type) else type(error)):
        load_best(tmp_path, *state(0)[:2])


def test_a_checkpoint_of_an_older_version_is_taken(tmp_path: Path) -> None:
    """It has no hash, and knows less."""
    saved, other = save(tmp_path, 8), state(1)
    known = {"images": 8, "validation": {"loss": 0.5}, "best": 0.25, "best_at": 1, "stale": 3}
    (tmp_path / "000000008" / FACTS).write_text(json.dumps(known))
    assert load_newest(tmp_path, *other) == facts(8)
    assert same(saved, other)


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
    saved = {}
    for images in (8, 16, 24, 1_000_000_000):  # the last name is longer than the others
        saved[images] = save(tmp_path, images, best_at=min(images, 16), keep=2)
    assert names(tmp_path) == ["000000024", "1000000000", BEST, NEWEST]
    network, average, _ = state(1)
    assert load_best(tmp_path, network, average) == facts(16, best_at=16)
    for one, other in ((saved[16][0].state_dict(), network.state_dict()), (saved[16][1].state(), average.state())):
        assert all(torch.equal(one[name], other[name]) for name in one), "buffers too"


def test_the_best_is_no_second_copy_on_disk(tmp_path: Path) -> None:
    save(tmp_path, 8, best_at=8)
    assert (tmp_path / BEST / TENSORS).samefile(tmp_path / "000000008" / TENSORS)


def test_without_hard_links_the_best_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(one: Path, other: Path) -> NoReturn:
        raise PermissionError(1, "Operation not permitted", one, None, other)  # as FAT says it

    monkeypatch.setattr("os.link", no_links)
    save(tmp_path, 8, best_at=8)
    assert load_best(tmp_path, *state(1)[:2]) == facts(8, best_at=8)


@pytest.mark.parametrize("best", [None, 8])
def test_a_kill_before_the_best_was_kept_is_mended(tmp_path: Path, best: int | None) -> None:
    """As it lies there between the writing of a checkpoint and that of `best`, which is missing or an older one."""
    if best is not None:
        save(tmp_path, best, best_at=best)
    save(tmp_path, 16, best_at=2)
    (tmp_path / "000000016" / FACTS).write_text(json.dumps(asdict(facts(16, best_at=16))))
    tidy(tmp_path, 1, load_newest(tmp_path, *state(1)))
    assert (tmp_path / BEST / TENSORS).samefile(tmp_path / "000000016" / TENSORS)
    assert names(tmp_path) == ["000000016", BEST, NEWEST]


def test_a_damaged_checkpoint_takes_no_good_ones_place(tmp_path: Path) -> None:
    for images in (8, 16):
        save(tmp_path, images)
    damage(tmp_path / "000000016" / TENSORS, "cut")
    tidy(tmp_path, 1, load_newest(tmp_path, *state(1)))
    assert load_newest(tmp_path, *state(1)) == facts(8)
    save(tmp_path, 12, keep=1)
    assert load_newest(tmp_path, *state(1)) == facts(12)


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_damaged_best_is_said_so(tmp_path: Path, how: str) -> None:
    save(tmp_path, 8, best_at=8)
    damage(tmp_path / BEST / TENSORS, how)
    with pytest.raises(RunError, match=r"The best checkpoint .* is damaged .*; delete that folder") as caught:
        load_best(tmp_path, *state(0)[:2])
    assert "\n" not in str(caught.value)


# ---- what is in it


def test_only_what_is_trained_is_stored(tmp_path: Path) -> None:
    """As of a large model with a small addition: its weights stay out, and are not touched by loading."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"large": nn.Linear(1000, 1000), "norm": nn.BatchNorm1d(3), "small": nn.Linear(4, 4)})
    network["large"].requires_grad_(False)
    network["small"].register_buffer("scratch", torch.zeros(2), persistent=False)
    average = WeightAverage(network, 1)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
    checkpoints.save(tmp_path, 1, network, average, optimizer, Facts(8))
    stored = load_file(tmp_path / "000000008" / TENSORS)
    assert {name for name in stored if name.startswith("network.")} == {
        f"network.{name}"
        for name in (
            *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
            *("small.weight", "small.bias"),
        )
    }
    assert sum(name.startswith("average.") for name in stored) == 4
    assert (tmp_path / "000000008" / TENSORS).stat().st_size < 4_000
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(5.0)
    load_newest(tmp_path, network, average, optimizer)
    assert (network["large"].weight == 5).all()
    assert not (network["small"].weight == 5).any()


def resumed(folder: Path, begin: Callable[[], State]) -> Iterator[tuple[State, State]]:
    """A training and the same resumed by another, at that moment and after each of two steps more."""

    def step(training: State, seed: int) -> None:
        network, average, optimizer = training
        weight = next(network.parameters())
        torch.manual_seed(seed)
        network(torch.randn(2, weight.shape[1], 5, 5).to(weight.device)).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / seed
        optimizer.step()
        optimizer.zero_grad()
        average.update(4, 4, optimizers.reached(optimizer, average.parameters))

    whole, other = begin(), begin()
    for seed in (1, 2, 3):
        step(whole, seed)
    checkpoints.save(folder, 1, *whole, Facts(8))
    load_newest(folder, *other)
    yield whole, other
    for seed in (4, 5):
        step(whole, seed)
        step(other, seed)
        yield whole, other


@pytest.mark.parametrize("fused", [True, False])
def test_the_optimiser_goes_on_alike_whatever_the_layout_in_memory(tmp_path: Path, fused: bool) -> None:
    """A fused kernel takes state and parameter as they lie in memory, without a look at how."""

    def begin() -> State:
        torch.manual_seed(0)
        network = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
        return network, WeightAverage(network, 1), torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused)

    assert all(same(*pair) for pair in resumed(tmp_path, begin))


def test_schedule_free_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """It counts by group too: without those the average would begin anew."""

    def begin() -> State:
        torch.manual_seed(0)
        network = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        chosen = config(TrainConfig, tmp_path, tmp_path, optimizer="schedule-free", lr=0.1)
        return network, WeightAverage(network, 0), optimizers.new(network, chosen, {})

    for whole, other in resumed(tmp_path, begin):
        assert same(whole, other)
    assert not torch.equal(whole[1].averages[0], next(whole[0].parameters()))


@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("bitsandbytes") is None, reason="needs CUDA")
def test_eight_bits_go_on_with_the_same_bits(tmp_path: Path) -> None:
    def begin() -> State:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(64, 32, 3), nn.Conv2d(32, 64, 3)).cuda()  # which share tables
        network = network.to(memory_format=torch.channels_last)
        chosen = config(TrainConfig, tmp_path, tmp_path, optimizer="adamw-8bit", lr=0.1)
        return network, WeightAverage(network, 0), optimizers.new(network, chosen, {})

    for whole, other in resumed(tmp_path, begin):
        assert all(torch.equal(*pair) for pair in zip(whole[0].parameters(), other[0].parameters(), strict=True))


def test_a_table_that_parameters_share_is_stored(tmp_path: Path) -> None:
    """As bitsandbytes' AdamW has them of 8-bit numbers."""
    network, average, optimizer = state(0, steps=1)
    table = torch.linspace(-1, 1, 256)
    for parameter in network.parameters():
        optimizer.state[parameter]["qmap1"] = table
    checkpoints.save(tmp_path, 1, network, average, optimizer, Facts(8))
    other, other_average, other_optimizer = state(1, steps=1)
    assert load_newest(tmp_path, other, other_average, other_optimizer) is not None
    assert all(torch.equal(one["qmap1"], table) for one in other_optimizer.state.values())


def test_the_state_of_other_parameters_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same parameters in another order, as another version might hand them to the optimiser."""
    network, average, optimizer = state(0, steps=1)
    checkpoints.save(tmp_path, 1, network, average, optimizer, Facts(8))
    turned = torch.optim.AdamW(list(network.parameters())[::-1])
    with pytest.raises(RunError, match="is damaged"):
        load_newest(tmp_path, network, average, turned)
    assert "another network's" in caplog.text


# ---- what a checkpoint knows


@given(st.lists(st.floats(0, 9).map(lambda loss: round(loss, 1)), min_size=1, max_size=20))
def test_facts_follow_the_validations(losses: list[float]) -> None:
    known = Facts()
    assert not known.is_best
    for number, loss in enumerate(losses, start=1):
        known = known.trained_on(8, 2.0).judged({"loss": loss, "psnr": 1.0})
        so_far = losses[:number]
        first = so_far.index(min(so_far))  # an equal loss is no new best
        assert known == Facts(
            8 * number, {"loss": loss, "psnr": 1.0}, so_far[first], 8 * (first + 1), number - 1 - first, trained=2.0
        )
        assert known.is_best == (first == number - 1)
        assert not replace(known, images=8 * number + 8).is_best
        assert Facts(**json.loads(json.dumps(asdict(known)))) == known


def test_the_best_is_by_the_figure_that_counts() -> None:
    known = Facts()
    for loss, cmmd in ((3.0, 5.0), (2.0, 4.0), (1.0, 6.0)):
        known = known.trained_on(8, 2.0).judged({"loss": loss, "cmmd": cmmd}, "cmmd")
    assert (known.best, known.best_at, known.stale) == (4.0, 16, 1)
    assert known.gap == -1.0, "the gap is of losses all the same"


MOVES = st.lists(st.sampled_from([(1, -1), (1, -1), (1, -1), (1, 0), (0, -1), (1, 1), (-1, -1)]), max_size=20)


@given(MOVES)
@example([(1, -1)] * 3 + [(-1, -1)] + [(1, -1)] * 4)
def test_overfitting_is_noticed_once_when_the_losses_draw_apart(moves: list[tuple[int, int]]) -> None:
    """Losses of validation and training; each mean is over two steps."""
    losses = [(100.0 + sum(v for v, _ in moves[:n]), 100.0 + sum(t for _, t in moves[:n])) for n in range(len(moves))]
    known, noticed = Facts(), []
    for number, (validation, training) in enumerate(losses):
        known = known.trained_on(8, training - 1).trained_on(8, training + 1).judged({"loss": validation})
        known = Facts(**json.loads(json.dumps(asdict(known))))  # as a resume has it
        assert known.gap == validation - training
        if known.begins_to_overfit:
            noticed.append(number)
    apart = [
        number
        for number in range(3, len(losses))
        if all(
            losses[k][0] > losses[k - 1][0] and losses[k][1] < losses[k - 1][1] for k in range(number - 2, number + 1)
        )
    ]
    assert noticed == apart[:1]


def test_without_a_training_loss_nothing_is_noticed() -> None:
    assert Facts().gap is None
    known = Facts(8).judged({"loss": 1.0})
    assert known.gap is None
    assert not known.begins_to_overfit
