"""Layers that learn faster in bf16 on a CPU: the same answers and slopes as PyTorch's, and elsewhere PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from limner.models import kernels
from tiny import WIDTH, tiny_unet

LAST = torch.channels_last


def quickened(layer: nn.Module) -> nn.Module:
    """A copy of it with this module's layers."""
    other = nn.Sequential(copy.deepcopy(layer))
    kernels.quicken(other)
    return other[0]


def learned(layer: nn.Module, x: Tensor, *, bf16: bool = True) -> list[Tensor]:
    """The answer to x, and the slopes of a sum of it by x and by the weights, in fp32."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        answer = layer(x)
    slope = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return [
        answer.float(),
        *(g.float() for g in torch.autograd.grad(answer, [x, *layer.parameters()], slope.to(answer))),
    ]


def assert_alike(found: list[Tensor], exact: list[Tensor]) -> None:
    """As far as bf16 can tell."""
    for one, other in zip(found, exact, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 0.01 * other.norm() + 1e-3


@given(
    side=st.integers(1, 7),
    images=st.integers(1, 5),
    kernel=st.sampled_from([1, 2, 3]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 1, (1, 0)]),
    last=st.booleans(),
)
def test_a_convolution_learns_as_pytorchs_does(
    side: int, images: int, kernel: int, stride: int, padding: int | tuple[int, int], last: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, kernel, stride, padding).to(torch.bfloat16).float()
    x = torch.randn(images, 4, side + 2, side + 2).to(torch.bfloat16).float()
    if last:
        layer, x = layer.to(memory_format=LAST), x.to(memory_format=LAST)  # type: ignore[call-overload]
    quick = quickened(layer)
    assert type(quick) is kernels.Convolution
    assert_alike(learned(quick, x), learned(layer, x, bf16=False))


@given(
    side=st.integers(1, 9),
    images=st.integers(1, 5),
    groups=st.sampled_from([1, 2, 4]),
    last=st.booleans(),
    mean=st.sampled_from([0.0, 3.0]),
    large=st.booleans(),
)
def test_a_group_norm_learns_as_pytorchs_does(
    side: int, images: int, groups: int, last: bool, mean: float, large: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.GroupNorm(groups, 8)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = (torch.randn(images, 8, side + 1, side) + mean).to(torch.bfloat16)
    if last:
        x = x.to(memory_format=LAST)
    quick = quickened(layer)
    assert type(quick) is kernels.GroupNorm
    with pytest.MonkeyPatch.context() as patched, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        patched.setattr(kernels, "LARGE", 0 if large else 2**20)
        with torch.enable_grad():
            found = learned(quick, x)
        assert torch.equal(quick(x).float(), found[0]), "as in validation"
        assert quick(x).dtype == torch.bfloat16
    assert_alike(found, learned(layer, x.float(), bf16=False))


def test_blocks_of_pictures_are_normalised_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = quickened(nn.GroupNorm(2, 8)), torch.randn(5, 8, 4, 4).to(torch.bfloat16)
    monkeypatch.setattr(kernels, "LARGE", 0)
    whole = learned(layer, x)
    monkeypatch.setattr(kernels, "BLOCK", 2 * 8 * 16)
    for one, other in zip(learned(layer, x), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_tokens_are_normalised_in_fp32() -> None:
    layer, x = nn.GroupNorm(2, 8), torch.randn(3, 8, 5).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quickened(layer)(x), layer(x.float()).to(torch.bfloat16))


def test_many_places_and_other_settings_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise AssertionError("this is PyTorch's")

    layer, norm = quickened(nn.Conv2d(2, 2, 3, 1, 1)), quickened(nn.GroupNorm(1, 2))
    x = torch.randn(1, 2, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
        monkeypatch.setattr(kernels._Convolved, "apply", refuse)
        monkeypatch.setattr(kernels._Normalised, "apply", refuse)
        layer(torch.randn(3, 2, 32, 32)).sum().backward()
        with pytest.raises(AssertionError, match="PyTorch's"):
            layer(x)
        layer.weight.requires_grad_(False)
        layer(x)
        layer.weight.requires_grad_(True)
    for module in (layer, norm):
        module(x).sum().backward()  # in fp32
    for odd in (
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(2, 2, 3, dilation=2),
        nn.Conv2d(2, 2, 3, bias=False),
        nn.GroupNorm(1, 2, affine=False),
    ):
        assert type(quickened(odd)) is type(odd)
    with torch.autocast("cpu", torch.bfloat16):
        for odd in (nn.Conv2d(2, 2, 3, padding="same"), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")):
            quickened(odd)(x)


def test_a_unet_keeps_its_names_and_what_it_draws() -> None:
    network = tiny_unet()
    names, given = list(network.state_dict()), (torch.randn(2, 4, 8, 8), 500, torch.randn(2, 7, WIDTH))
    plain = network(*given).sample
    kernels.quicken(network.train())
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(*given).sample, plain)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(*given).sample
    rough.float().square().mean().backward()
    assert (rough - plain).norm() < 0.05 * plain.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
