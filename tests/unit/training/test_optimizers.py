"""Muon and AdamW against torch's own, which parameters go to which, and that each keeps to its share of the rate."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.testing import assert_close

from limner.config import TrainConfig, TrainUnetConfig
from limner.errors import ConfigError
from limner.settings import resolve
from limner.training import optimizers
from limner.training.optimizers import BETAS, EPS, orthogonal, reached
from tiny import tiny_clip, tiny_unet, tiny_vae
from trainings import config

LR, DECAY = 0.02, 0.1


def settings(**given: Any) -> TrainConfig:
    """The configuration of a training."""
    return config(TrainConfig, Path("nowhere"), Path("r"), lr=LR, weight_decay=DECAY, **given)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """A tensor of unit normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Holder(nn.Module):
    """Parameters by name, all drawn from a unit normal."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for number, (name, shape) in enumerate(shapes.items()):
            self.register_parameter(name, nn.Parameter(drawn(*shape, seed=number)))


def descend(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps with gradients that are drawn by step and parameter; each parameter's are as the first ones were, half."""
    for step in range(steps):
        for number, parameter in enumerate(network.parameters()):
            shape = parameter.shape
            parameter.grad = drawn(*shape, seed=99 + number) + drawn(*shape, seed=1000 * step + number)
        optimizer.step()


# ---- Muon


@pytest.mark.parametrize("shape", [(6, 24), (24, 6), (16, 48), (1, 12), (12, 1)])
def test_orthogonal_is_near_that_of_the_svd(shape: tuple[int, int]) -> None:
    matrices = torch.stack([drawn(*shape, seed=seed) * 10.0 ** (seed - 2) for seed in range(5)])
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    wanted, found = u @ vh, orthogonal(matrices)
    cosine = (wanted * found).sum(dim=(1, 2)) / wanted.norm(dim=(1, 2)) / found.norm(dim=(1, 2))
    assert cosine.min() > 0.97
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_orthogonal_takes_each_matrix_by_itself(rows: int, columns: int, count: int, seed: int) -> None:
    matrices = drawn(count, rows, columns, seed=seed)
    together = orthogonal(matrices)
    assert together.shape == matrices.shape
    for matrix, direction in zip(matrices, together):
        assert_close(orthogonal(matrix[None])[0], direction)
        assert_close(orthogonal(matrix.mT[None])[0], direction.mT)


@pytest.mark.parametrize("shape", [(16, 144), (16, 32), (16, 31), (16, 16), (64, 16)])
@pytest.mark.parametrize("noise", [1.0, 1e-4])
def test_orthogonal_is_the_iteration_as_it_is_written(shape: tuple[int, int], noise: float) -> None:
    """Jordan's, in float64; also of gradients that are all but of rank two."""
    a, b, c = optimizers.NEWTON_SCHULZ
    matrix = drawn(shape[0], 2, seed=1) @ drawn(2, shape[1], seed=2) + noise * drawn(*shape)
    x = matrix.double() / matrix.norm().double()
    x = x.mT if shape[0] > shape[1] else x
    for _ in range(5):
        x = a * x + (b * x @ x.mT + c * x @ x.mT @ x @ x.mT) @ x
    wanted = x.mT if shape[0] > shape[1] else x
    assert (orthogonal(matrix[None])[0] - wanted).norm() < 1e-3 * wanted.norm()


def test_a_gradient_of_zero_moves_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 0.03), ("bf16", 0.06)])
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (12, 4, 3, 3), (4, 12, 1, 1)])
def test_muon_moves_as_torchs_own(shape: tuple[int, ...], precision: str, apart: float) -> None:
    """Loosely, as torch's iterates in bf16; a kernel is a matrix of its output channels."""
    ours, before = Holder(a=shape, b=shape), Holder(a=shape, b=shape)
    optimizer = optimizers.new(ours, settings(optimizer="muon", precision=precision), {})
    flat = [nn.Parameter(p.detach().flatten(1).clone()) for p in before.parameters()]
    reference = torch.optim.Muon(
        flat, lr=LR, weight_decay=DECAY, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for steps in (1, 12):
        for step in range(steps):
            for number, (one, other) in enumerate(zip(ours.parameters(), flat)):
                one.grad = drawn(*shape, seed=100 * steps + 2 * step + number)
                other.grad = one.grad.flatten(1).clone()
            optimizer.step()
            reference.step()
        for first, one, other in zip(before.parameters(), ours.parameters(), flat):
            moved, wanted = (one - first).flatten(1), other - first.flatten(1)
            assert (moved - wanted).norm() < apart * wanted.norm()


def test_the_size_of_muons_step_is_adamws() -> None:
    """So that both take the same learning rate: 0.2 of it, root mean square (Liu et al. 2502.16982, section 2.2)."""
    for shape in ((64, 16), (16, 64), (32, 4, 3, 3)):
        network = Holder(a=shape)
        before = network.a.detach().clone()
        optimizer = optimizers.new(network, settings(optimizer="muon").model_copy(update={"weight_decay": 0.0}), {})
        descend(network, optimizer, 1)
        size = (network.a - before).square().mean().sqrt().item()
        assert size == pytest.approx(0.2 * LR, rel=0.25)


def test_the_rest_of_muon_moves_as_torchs_adamw() -> None:
    shapes = {"bias": (7,), "gain": (), "embedding": (9, 5), "conv_in": (4, 3, 3, 3)}
    ours, theirs = Holder(**shapes), Holder(**shapes)
    optimizer = optimizers.new(ours, settings(optimizer="muon"), {})
    assert not any(group["muon"] for group in optimizer.param_groups)
    decayed = [{"params": [p], "weight_decay": DECAY if p.ndim >= 2 else 0.0} for p in theirs.parameters()]
    reference = torch.optim.AdamW(decayed, lr=LR, betas=BETAS, eps=EPS)
    for steps in (1, 1, 20):
        descend(ours, optimizer, steps)
        descend(theirs, reference, steps)
        for one, other in zip(ours.parameters(), theirs.parameters()):
            assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_parameters_without_a_gradient_stay() -> None:
    network = Holder(a=(3, 4), b=(3, 4), bias=(3,))
    before = [p.detach().clone() for p in network.parameters()]
    network.a.grad = drawn(3, 4)
    optimizers.new(network, settings(optimizer="muon"), {}).step()
    assert [torch.equal(p, then) for p, then in zip(network.parameters(), before)] == [False, True, True]


# ---- schedule-free AdamW


def test_schedule_free_is_its_authors_and_the_result_is_what_they_evaluate() -> None:
    """To the bit, and without moving the weights there and back, which would cost some."""
    ours, theirs = Holder(a=(6, 4), bias=(6,)), Holder(a=(6, 4), bias=(6,))
    optimizer = optimizers.new(ours, settings(optimizer="schedule-free"), {})
    decayed = [{"params": [theirs.a], "weight_decay": DECAY}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference = AdamWScheduleFree(decayed, lr=LR, betas=BETAS, eps=EPS)
    assert all(map(torch.equal, reached(optimizer, ours.parameters()), ours.parameters())), "nothing yet to average"
    for _ in range(3):
        reference.train()
        descend(ours, optimizer, 4)
        descend(theirs, reference, 4)
        before = [p.detach().clone() for p in ours.parameters()]
        found = reached(optimizer, ours.parameters())
        assert all(map(torch.equal, before, ours.parameters()))
        reference.eval()
        for one, other, y in zip(found, theirs.parameters(), before):
            assert_close(one, other, rtol=1e-6, atol=1e-6)
            assert not torch.equal(one, y)


def test_the_result_of_schedule_free_is_the_mean_of_its_iterates() -> None:
    """At a constant rate all count alike (Defazio et al. 2405.15682, section 2)."""
    network = Holder(a=(5, 3))
    optimizer = optimizers.new(network, settings(optimizer="schedule-free"), {})
    iterates = []
    for step in range(6):
        network.a.grad = drawn(5, 3, seed=step)
        optimizer.step()
        iterates.append(optimizer.state[network.a]["z"].clone())
        assert_close(reached(optimizer, [network.a])[0], torch.stack(iterates).mean(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_other_optimisers_reach_their_parameters(kind: str) -> None:
    network = Holder(a=(6, 4), bias=(6,))
    optimizer = optimizers.new(network, settings(optimizer=kind), {})
    descend(network, optimizer, 3)
    assert all(map(torch.equal, reached(optimizer, network.parameters()), network.parameters()))


def test_schedule_free_turns_off_what_it_takes_the_place_of_and_refuses_it() -> None:
    chosen = config(TrainUnetConfig, Path("nowhere"), Path("r"), optimizer="schedule-free")
    assert (chosen.schedule, chosen.ema_halflife) == ("constant", 0)
    assert resolve(TrainUnetConfig, chosen.model_dump()) == chosen
    for more in ({"schedule": "cosine"}, {"schedule": "cooldown"}, {"ema_halflife": 5}):
        with pytest.raises(ConfigError, match="; set schedule=constant and ema_halflife=0"):
            config(TrainUnetConfig, Path("nowhere"), Path("r"), optimizer="schedule-free", **more)
    assert config(TrainUnetConfig, Path("nowhere"), Path("r")).schedule == "cooldown"


def test_a_preset_becomes_schedule_free_as_it_is_said() -> None:
    given, sets = {"data": "d", "out": "r"}, ["optimizer=schedule-free", "schedule=constant"]
    with pytest.raises(ConfigError, match="; set schedule=constant and ema_halflife=0"):
        resolve(TrainUnetConfig, given, preset="builtin", sets=sets)
    assert resolve(TrainUnetConfig, given, preset="builtin", sets=[*sets, "ema_halflife=0"])


# ---- what is not there


def test_eight_bits_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer=adamw-8bit needs a CUDA GPU, and trains on cpu here; use .*\.$"):
        optimizers.refuse_missing("adamw-8bit", torch.device("cpu"))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer=adamw-8bit needs a package: pip install bitsandbytes; or .*\.$"):
        optimizers.refuse_missing("adamw-8bit", torch.device("cuda"))


@pytest.mark.parametrize("kind", ["adamw", "muon", "schedule-free"])
def test_what_is_there_is_not_refused(kind: str) -> None:
    optimizers.refuse_missing(kind, torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("bitsandbytes") is None, reason="needs CUDA")
def test_eight_bits_move_about_as_adamw_does() -> None:
    ours, theirs = Holder(a=(64, 128), bias=(6,)).cuda(), Holder(a=(64, 128), bias=(6,)).cuda()
    chosen = [optimizers.new(each, settings(optimizer=k), {}) for each, k in ((ours, "adamw-8bit"), (theirs, "adamw"))]
    before = theirs.a.detach().clone()
    for step in range(10):
        for number, (one, other) in enumerate(zip(ours.parameters(), theirs.parameters())):
            one.grad = other.grad = drawn(*one.shape, seed=10 * step + number).cuda()
        for optimizer in chosen:
            optimizer.step()
    assert chosen[0].state[ours.a]["state1"].dtype == torch.uint8
    assert (ours.a - theirs.a).norm() < 0.1 * (theirs.a - before).norm()


# ---- which parameters go where


def group_of(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, dict[str, Any]]:
    """The group's settings by parameter's name; each parameter is in one group."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    found = [(names[p], group) for group in optimizer.param_groups for p in group["params"]]
    assert len({name for name, _ in found}) == len(found)
    return dict(found)


@pytest.mark.parametrize("kind", ["adamw", "muon", "schedule-free"])
@pytest.mark.parametrize("network", [tiny_unet(), tiny_vae(), tiny_clip()], ids=["unet", "vae", "clip"])
def test_only_matrices_and_kernels_decay(network: nn.Module, kind: str) -> None:
    groups = group_of(optimizers.new(network, settings(optimizer=kind), {}), network)
    for name, parameter in network.named_parameters():
        assert groups[name]["weight_decay"] == (DECAY if parameter.ndim >= 2 else 0.0), name
    assert len({id(group) for group in groups.values()}) <= 3


@pytest.mark.parametrize(
    ("network", "ends", "inner"),
    [
        (
            tiny_unet(),
            {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"},
            {
                "down_blocks.1.attentions.0.proj_out",
                "down_blocks.0.resnets.0.conv1",
                "mid_block.resnets.0.time_emb_proj",
            },
        ),
        (
            tiny_vae(),
            {"encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out"},
            {"encoder.down_blocks.0.resnets.0.conv1", "quant_conv", "encoder.mid_block.attentions.0.to_q"},
        ),
        (
            tiny_clip(),
            {
                "text_model.embeddings.token_embedding",
                "text_model.embeddings.position_embedding",
                "vision_model.embeddings.patch_embedding",
                "vision_model.embeddings.position_embedding",
            },
            {
                "text_projection",
                "text_model.encoder.layers.0.self_attn.q_proj",
                "vision_model.encoder.layers.1.mlp.fc2",
            },
        ),
    ],
    ids=["unet", "vae", "clip"],
)
def test_muon_takes_the_matrices_between_the_ends(network: nn.Module, ends: set[str], inner: set[str]) -> None:
    groups = group_of(optimizers.new(network, settings(optimizer="muon"), {}), network)
    matrices = {name.removesuffix(".weight") for name, p in network.named_parameters() if p.ndim >= 2}
    taken = {name.removesuffix(".weight") for name, group in groups.items() if group["muon"]}
    assert matrices - taken == ends
    assert taken <= matrices
    assert inner <= taken


def test_adamw_is_torchs_own() -> None:
    network = tiny_vae()
    optimizer = optimizers.new(network, settings(), {})
    assert type(optimizer) is torch.optim.AdamW
    assert all((group["betas"], group["eps"], group["lr"]) == (BETAS, EPS, LR) for group in optimizer.param_groups)


def test_frozen_parameters_are_in_no_group() -> None:
    network = Holder(a=(3, 4), b=(3, 4), bias=(3,))
    network.b.requires_grad_(False)
    for kind in ("adamw", "muon", "schedule-free"):
        assert set(group_of(optimizers.new(network, settings(optimizer=kind), {}), network)) == {"a", "bias"}


@given(st.dictionaries(st.sampled_from(["a", "b", "bias", "embedding"]), st.sampled_from([0.0, 0.25, 0.5])))
def test_each_parameter_has_its_share_of_the_rate(rates: dict[str, float]) -> None:
    network = Holder(a=(3, 4), b=(3, 4), bias=(3,), embedding=(5, 2))
    for kind in ("adamw", "muon", "schedule-free"):
        groups = group_of(optimizers.new(network, settings(optimizer=kind), rates), network)
        assert {name: group["rate"] for name, group in groups.items()} == {
            name: rates.get(name, 1.0) for name in groups
        }
