"""Layers laid bare answer as PyTorch's own, on the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from limner.models.bare import FEW, LAYERS, lay_bare
from tiny import WIDTH, tiny_unet

PLAIN = {
    "linear": (nn.Linear(8, 6), (3, 5, 8)),
    "linear without bias": (nn.Linear(8, 6, bias=False), (3, 8)),
    "convolution": (nn.Conv2d(8, 6, 3, padding=1), (2, 8, 7, 5)),
    "every setting of a convolution": (nn.Conv2d(8, 6, 3, 2, "valid", 2, 2, bias=False), (2, 8, 9, 9)),
    "layer norm": (nn.LayerNorm((5, 8), eps=0.1), (3, 5, 8)),
    "layer norm without weights": (nn.LayerNorm(8, elementwise_affine=False), (3, 5, 8)),
    "group norm": (nn.GroupNorm(2, 8, eps=0.1), (2, 8, 7, 5)),
    "group norm of many places": (nn.GroupNorm(2, 8), (2, 8, 32, FEW // 32)),
    "group norm of tokens": (nn.GroupNorm(2, 8, affine=False), (2, 8, 9)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layer", "shape"), PLAIN.values(), ids=PLAIN)
@torch.no_grad()
def test_each_layer_answers_as_before(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, given = copy.deepcopy(layer).to(dtype), torch.randn(shape, dtype=dtype)
    for parameter in layer.parameters():
        parameter.normal_()
    if given.dim() == 4:
        given = given.contiguous(memory_format=torch.channels_last)
    wanted = layer(given)
    lay_bare(layer)
    assert type(layer) in LAYERS.values()
    assert_close(layer(given), wanted, **({"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {}))


@torch.no_grad()
def test_a_network_keeps_its_weights_and_answers() -> None:
    unet = tiny_unet()
    given = torch.randn(2, 4, 8, 8), torch.tensor(600), torch.randn(2, 7, WIDTH)
    names, wanted = list(unet.state_dict()), unet(*given)[0]
    lay_bare(unet)
    assert {type(layer) for layer in unet.modules()}.isdisjoint(LAYERS)
    assert list(unet.state_dict()) == names
    assert_close(unet(*given)[0], wanted, atol=1e-5, rtol=0)
    unet.conv_out.weight.mul_(2)
    assert not torch.equal(unet(*given)[0], wanted)


def test_what_somebody_has_altered_is_left_alone() -> None:
    class Own(nn.Linear):
        pass

    hooked = nn.Linear(2, 2)
    hooked.forward = lambda x: x + 1  # type: ignore[method-assign]
    others = nn.ModuleList([hooked, Own(2, 2), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")])
    kinds = [type(layer) for layer in others]
    lay_bare(others)
    assert [type(layer) for layer in others] == kinds
    assert hooked(torch.zeros(1)) == 1
