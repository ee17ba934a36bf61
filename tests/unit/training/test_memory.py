"""What a training needs is what it takes; too little of it is said beforehand, with what would help."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from limner.config import TrainClipConfig, TrainConfig
from limner.errors import RunError
from limner.training import memory, optimizers, processes
from limner.training.loop import plan_training, run_training
from limner.training.memory import Need, remedies
from limner.training.task import place
from trainings import Summing, config, run_summing

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
WIDTH = 500
HUGE = 10**18


def settings(out: Path = Path("r"), **given: Any) -> TrainConfig:
    """The configuration of a training."""
    return config(TrainConfig, Path("nowhere"), out, **given)


class Wide(Summing):
    """Two layers of `WIDTH`, the first of them frozen, and batch norm, which writes to its buffers."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(16, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
        )
        self.network[1].requires_grad_(False)

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.cat([batch["x"], batch["x"] + 1])  # batch norm wants more than one
        return (network(x) - 1).square().mean(), {}


def need(task: type[Summing] = Wide, **given: Any) -> Need:
    """What a training of a task needs."""
    chosen = settings(**given)
    made = task(chosen)
    place(made.network, processes.join(None))
    return Need.of(made, chosen, processes.join(None))


def test_weights_and_what_goes_with_them_are_counted() -> None:
    trained, frozen = 4 * (WIDTH * WIDTH + WIDTH + 2 * WIDTH), 4 * 17 * WIDTH
    found = need()
    assert (found.trained, found.frozen, found.optimizer) == (trained, frozen, 2 * trained)
    assert found.lasting == 5 * trained + frozen
    assert need(optimizer="muon").optimizer == trained


def test_activations_grow_with_the_images_that_are_held() -> None:
    """Of each of its two rows: what batch norm takes, what ReLU gives (and the layer takes), and the difference."""
    few, more = need(batch_size=8).activations, need(batch_size=16).activations
    row = 4 * WIDTH
    assert more - few == 8 * 2 * row * 3
    assert 2 * row * 3 <= need(batch_size=1).activations < 2 * row * 3 + 6 * row, "a few statistics, and no weights"
    assert need(batch_size=16, micro_batch_size=8).activations == few
    assert need(batch_size=16, micro_batch_size=64).activations == more


def test_measuring_changes_nothing() -> None:
    torch.manual_seed(0)
    task = Wide(settings())
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    Need.of(task, settings(), processes.join(None))
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.network.state_dict().items())
    assert all(p.grad is None for p in task.network.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon", "schedule-free"])
def test_the_checkpoint_is_as_large_as_was_said(tmp_path: Path, kind: str) -> None:
    """But for the ends of a network under Muon, counts, and the header."""
    run = run_training(Wide, settings(tmp_path / "r", optimizer=kind, images=8))
    file = run / "checkpoints" / "000000008" / "state.safetensors"
    buffers = 4 * 2 * WIDTH
    assert sum(t.numel() * t.element_size() for t in load_file(file).values()) == pytest.approx(
        need(optimizer=kind).checkpoint + buffers, rel=0.02
    )


def test_too_little_memory_is_said_in_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    accelerator = processes.join(None)
    with caplog.at_level(logging.WARNING):
        Need(4, 4, 4, 8, 10).warn(settings(), accelerator)
        Need(0, HUGE, 0, 0, 0).warn(settings(), accelerator)  # weights that are there already need no more
        assert caplog.text == ""
        Need(4, 4, 4, 8, HUGE).warn(settings(), accelerator)
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("This training needs about 1,000,000,000,000 MB of memory, and ")
    assert said.endswith(
        "for activations of 8 images; what would need less: micro_batch_size below 8, checkpointing=true, "
        "precision=bf16, optimizer=muon."
    )


def test_only_what_would_help_is_named() -> None:
    accelerator = processes.join(None)
    spare = {"micro_batch_size": 1, "checkpointing": True, "precision": "bf16", "optimizer": "muon"}
    assert remedies(settings(**spare), accelerator).startswith("train a smaller model")
    for name, words in (
        ("micro_batch_size", "micro_batch_size below 8"),
        ("checkpointing", "checkpointing=true"),
        ("precision", "precision=bf16"),
        ("optimizer", "optimizer=muon"),
    ):
        chosen = settings(**{key: value for key, value in spare.items() if key != name})
        assert remedies(chosen, accelerator) == f"what would need less: {words}"
    clip = config(TrainClipConfig, Path("nowhere"), Path("r"), chunk_size=4)
    assert "chunk_size below 4" in remedies(clip, accelerator)


class Full(Summing):
    """A GPU's memory ends at the third image."""

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if network.training and len(batch["x"]) > 2:
            raise torch.OutOfMemoryError
        return super().loss(network, batch)


def test_memory_that_ends_in_a_step_is_said_in_one_sentence_and_smaller_parts_go_on(tmp_path: Path) -> None:
    chosen = settings(tmp_path / "r")
    with pytest.raises(RunError, match=r"not suffice for 8 images at once; .*: micro_batch_size below 8, check.*\.$"):
        plan_training(Full, chosen)
    with pytest.raises(RunError, match="not suffice for 8 images at once"):
        run_training(Full, chosen)
    assert (run_training(Full, chosen.model_copy(update={"micro_batch_size": 2})) / "model").exists()


class FullOfValidation(Summing):
    """What a validation draws has no room in the machine's memory."""

    def validate(self, samples: Path) -> dict[str, float]:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 1 bytes.")


def test_memory_that_ends_in_a_validation_is_said_in_one_sentence_too(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not suffice for 8 images at once; .*: micro_batch_size below 8, check.*\.$"):
        run_training(FullOfValidation, settings(tmp_path / "r"))


def full(*_: Any) -> NoReturn:
    """As a CPU says it."""
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 1 bytes.")


def test_memory_that_ends_before_the_first_step_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limner.training.loop.WeightAverage", full)
    with pytest.raises(RunError, match="not suffice for 8 images at once"):
        run_training(Summing, settings(tmp_path / "r"))


@pytest.mark.parametrize("where", ["place", "Need.of"])
def test_so_it_is_of_a_plan(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"limner.training.loop.{where}", full)
    with pytest.raises(RunError, match="not suffice for 8 images at once"):
        plan_training(Summing, settings(tmp_path / "r"))


def test_so_it_is_while_the_network_is_made(tmp_path: Path) -> None:
    for call in (plan_training, run_training):
        with pytest.raises(RunError, match="not suffice for 8 images at once"):
            call(full, settings(tmp_path / "r"))


@pytest.mark.parametrize("given", [{"lr": 0.004}, {"batch_size": 8}], ids=["batch_size", "lr"])
def test_so_it_is_while_a_number_is_looked_for(
    given: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limner.training.auto.place", full)
    with pytest.raises(RunError, match="not suffice for 8 images at once"):
        plan_training(Summing, settings(tmp_path / "r", **{"auto": True, "batch_size": None, "lr": None, **given}))


@linux
def test_what_there_is_and_what_was_taken_is_in_bytes() -> None:
    accelerator = processes.join(None)
    there, most = memory.free(accelerator), memory.peak(accelerator)
    assert there is not None
    assert most is not None
    assert 2**26 < there <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**26 < most < 2**36
    taken = torch.ones(2**26)
    after = memory.peak(accelerator)
    assert after is not None
    assert after >= most
    assert after >= taken.nbytes
    assert memory.proc("/proc/no/such/file", "VmRSS") is None


@pytest.mark.skipif(not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_what_is_freed_is_there_for_the_next_step() -> None:
    script = """
import os, resource, torch
from limner.training import memory
memory.keep_freed()
for _ in range(10):
    torch.ones(2**24)  # 64 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * os.sysconf("SC_PAGE_SIZE") / 2**26)
"""
    told = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert float(told) < 1, "of the ten had to be cleared"


@linux
def test_a_plan_and_a_log_have_memory(tmp_path: Path) -> None:
    plan = plan_training(Wide, settings(tmp_path / "r"))
    whole = need()
    assert plan["memory"].startswith(
        f"{whole.lasting / 1e6:,.0f} MB for weights, gradients, adamw and average, about "
        f"{whole.activations / 1e6:,.0f} MB for activations of 8 images; "
    )
    assert plan["memory"].endswith(" MB are free")
    run = run_summing(settings(tmp_path / "r", images=8))
    (first, *_) = (run / "events.jsonl").read_text().splitlines()
    assert '"peak_memory_mb": ' in first


def test_every_optimiser_has_its_size() -> None:
    assert set(memory.STATE) == set(TrainConfig.model_fields["optimizer"].annotation.__args__)  # type: ignore[union-attr]
    assert set(optimizers.PACKAGES) < set(memory.STATE)
