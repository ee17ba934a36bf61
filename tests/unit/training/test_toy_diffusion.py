"""The loss of `train unet`, and the whole way with it: a small network learns a mixture and draws it as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch.testing import assert_close

from limner.config import TrainUnetConfig
from limner.diffusion import objectives
from limner.errors import ConfigError
from limner.generation.engine import denoise, initial_noise
from limner.settings import resolve
from limner.training.loop import run_training
from mixtures import THREE, Masked, Toy, result

SETTINGS: dict[str, Any] = {
    "batch_size": 32,
    "images": 12_800,
    "lr": 4e-3,
    "warmup": 500,
    "ema_halflife": 500,
    "threads": 1,
}


def config(out: Path, **settings: Any) -> TrainUnetConfig:
    """The configuration of a training of `Toy`."""
    return resolve(TrainUnetConfig, {"data": Path("nowhere"), "out": out, **SETTINGS, **settings})


# ---- the whole way

LEARNED: dict[str, tuple[type[Toy], dict[str, Any], tuple[str, ...]]] = {
    "flow": (Toy, {"objective": "flow"}, ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep")),
    "flow cosine masked": (
        Masked,
        {"objective": "flow", "levels": "cosine"},
        ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"),
    ),
    "eps min-SNR": (
        Toy,
        {"objective": "eps", "levels": "uniform", "min_snr": 5},
        ("DPMSolverMultistep", "DDIM", "EulerDiscrete"),
    ),
    "v zero terminal SNR": (
        Toy,
        {"objective": "v", "levels": "uniform", "zero_terminal_snr": True},
        ("DPMSolverMultistep", "DDIM", "EulerDiscrete"),
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_trained_draws_modes_and_shares_as_they_are(name: str, tmp_path: Path) -> None:
    """Shares within 0.04, centres within 0.1 and deviations within a half, after 400 steps of the real loop."""
    make, settings, solvers = LEARNED[name]
    run = run_training(make, config(tmp_path / "r", **settings))
    network, task = result(run), make(config(tmp_path / "r", **settings))
    wanted = THREE.shares * torch.tensor([1.0, 1.0, 0.0 if make is Masked else 1.0])
    wanted /= wanted.sum()
    drawn_at_all = wanted > 0
    noise = initial_noise(range(64), (2, 8, 8))
    for solver in solvers:
        trailing = {"timestep_spacing": "trailing", "clip_sample": False} if solver in {"DDIM", "EulerDiscrete"} else {}
        scheduler = getattr(diffusers, f"{solver}Scheduler").from_config(task.scheduler.config, **trailing)
        drawn = denoise(network, scheduler, noise, torch.zeros(64, 1, 1), steps=50, guidance=1.0)
        shares, centres, std = THREE.found(drawn)
        assert (shares - wanted).abs().max() < 0.04, solver
        assert (centres - THREE.modes)[drawn_at_all].abs().max() < 0.1, solver
        assert (std[drawn_at_all] / THREE.std - 1).abs().max() < 0.5, solver


# ---- the loss


def batch_of(make: type[Toy], tmp_path: Path, **settings: Any) -> tuple[Toy, dict[str, torch.Tensor]]:
    """A task with an untrained network, and a batch of its examples."""
    torch.manual_seed(0)
    task = make(config(tmp_path, **settings))
    return task, task.first(16)


@torch.no_grad()
def test_what_is_masked_out_does_not_count(tmp_path: Path) -> None:
    task, batch = batch_of(Masked, tmp_path)
    outside = batch["mask"] == 0  # (N, 1, h, w)
    changed = {**batch, "noise": torch.where(outside, batch["noise"] + 5, batch["noise"])}
    assert_close(task.loss(task.network, changed)[0], task.loss(task.network, batch)[0])
    everywhere = {name: value for name, value in changed.items() if name != "mask"}
    assert task.loss(task.network, everywhere)[0] > 1.5 * task.loss(task.network, batch)[0]


@pytest.mark.parametrize("objective", ["flow", "eps", "v"])
@torch.no_grad()
def test_min_snr_weighs_the_error_of_each_picture_by_its_level(tmp_path: Path, objective: Any) -> None:
    plain, batch = batch_of(Toy, tmp_path, objective=objective, levels="uniform")
    weighted, _ = batch_of(Toy, tmp_path, objective=objective, levels="uniform", min_snr=2)
    errors = torch.stack(
        [plain.loss(plain.network, {name: value[k : k + 1] for name, value in batch.items()})[0] for k in range(16)]
    )
    alpha, sigma = objectives.level(objective, batch["t"], plain.betas)
    weights = objectives.min_snr(objective, alpha, sigma, 2)
    assert_close(plain.loss(plain.network, batch)[0], errors.mean())
    loss, figures = weighted.loss(weighted.network, batch)
    assert_close(loss, (weights * errors).mean())
    assert_close(figures["error"], errors.mean())
    assert weights.std() > 0.1, "the levels differ"


@pytest.mark.parametrize(("objective", "levels"), [("flow", "logit-normal"), ("eps", "uniform"), ("v", "uniform")])
def test_levels_are_those_that_models_of_a_kind_were_trained_with(tmp_path: Path, objective: Any, levels: Any) -> None:
    usual, _ = batch_of(Toy, tmp_path, objective=objective)
    said, _ = batch_of(Toy, tmp_path, objective=objective, levels=levels)
    other, _ = batch_of(Toy, tmp_path, objective=objective, levels="cosine")
    drawn = [task.first(16)["t"] for task in (usual, said, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# ---- settings that don't go together


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"objective": "eps", "levels": "uniform"}, "is for objective=v"),
        ({"objective": "flow", "levels": "uniform"}, "is for objective=v"),
        ({"objective": "v", "levels": "logit-normal"}, "set levels=uniform or levels=cosine"),
        ({"model": "builtin", "levels": "logit-normal"}, "set levels=uniform or levels=cosine"),
        ({"objective": "v", "levels": "cosine", "min_snr": 5}, "leave out one"),
    ],
)
def test_zero_terminal_snr_is_refused_where_the_last_step_would_teach_nothing(
    tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(tmp_path, zero_terminal_snr=True, **settings)
    config(tmp_path, **settings)


def test_a_model_is_asked_for_its_own_objective(tmp_path: Path) -> None:
    """The objective that is set is not its, so that the configuration can't refuse it."""
    config(tmp_path, model="some/model", zero_terminal_snr=True)
