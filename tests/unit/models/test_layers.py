"""Of a given U-Net only what is asked for is trained."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.testing import assert_close

from limner.errors import ModelError
from limner.models import layers
from tiny import WIDTH, tiny_unet


def test_cross_attention_is_what_reads_token_states() -> None:
    """Some U-Nets, such as Stable Diffusion's upscaler, attend to the text in the first place too."""
    network = tiny_unet(only_cross_attention=[False, True], mid_block_only_cross_attention=False)
    chosen = layers.tuned_layers(network, "cross_attention_kv")
    reads = [place for place, m in network.named_modules() if isinstance(m, Attention) and m.is_cross_attention]
    assert chosen == [f"{place}.{name}" for place in reads for name in ("to_k", "to_v")]
    assert {place[-5:] for place in reads} == {"attn1", "attn2"}
    assert len(layers.tuned_layers(network, "attention")) == 4 * 2 * 4


def test_a_unet_without_attention_is_trained_in_full_only() -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    network = tiny_unet(**blocks)
    assert "conv_in" in layers.tuned_layers(network, "full")
    for tune in ("attention", "cross_attention_kv"):
        with pytest.raises(ModelError, match="no such attention; train it with tune=full"):
            layers.freeze_others(network, tune)
    layers.freeze_others(network, "full")
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_plain_attention_answers_the_same() -> None:
    given = torch.randn(2, 4, 8, 8), 7, torch.randn(2, 5, WIDTH)
    network = tiny_unet().eval()
    with torch.no_grad():
        fused = network(*given).sample
        layers.attend_plainly(network)
        assert {type(block.processor) for block in network.modules() if isinstance(block, Attention)} == {AttnProcessor}
        torch.testing.assert_close(network(*given).sample, fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [64, (16, 64)])
def test_large_unets_keep_the_kernel_that_needs_little_memory(size: int | tuple[int, int]) -> None:
    network = tiny_unet(sample_size=size)
    before = network.attn_processors
    layers.attend_plainly(network)
    assert network.attn_processors == before


def test_what_is_dropped_differs_in_training_and_nothing_is_dropped_afterwards() -> None:
    given = torch.randn(2, 4, 8, 8), 7, torch.randn(2, 5, WIDTH)
    network = tiny_unet()
    with torch.no_grad():
        whole = network.eval()(*given).sample
        layers.drop_out(network, 0.3)
        one, other = (network.train()(*given).sample for _ in range(2))
        assert not torch.allclose(one, other)
        assert torch.equal(network.eval()(*given).sample, whole)
        layers.drop_out(network, 0.0)
        torch.testing.assert_close(network.train()(*given).sample, whole)
    assert network.config["dropout"] == 0.0  # what is saved is as it was


@torch.no_grad()
def test_what_an_image_drops_is_its_own() -> None:
    given, states, seeds = torch.randn(3, 4, 8, 8), torch.randn(3, 5, WIDTH), torch.tensor([7, 8, 2**62])
    network = tiny_unet().train()
    layers.drop_out(network, 0.3)

    def answered(*images: int) -> Tensor:
        chosen = list(images)
        layers.drop_by(network, seeds[chosen])
        answer: Tensor = network(given[chosen], 7, states[chosen]).sample
        return answer

    together = answered(0, 1, 2)
    for image in range(3):
        assert_close(answered(image)[0], together[image], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="zip"):
        network(given[:2], 7, states[:2])
    same = given[:1].expand(2, -1, -1, -1), 7, states[:1].expand(2, -1, -1)
    layers.drop_by(network, seeds[:2])
    one, other = network(*same).sample
    assert not torch.allclose(one, other)


@torch.no_grad()
def test_the_share_that_is_dropped_is_the_one_asked_for_and_layers_drop_apart() -> None:
    network = nn.Sequential(nn.Dropout(), nn.Dropout())
    layers.drop_out(network, 0.25)
    layers.drop_by(network, torch.tensor([5, 6]))
    one, other = (layer(torch.ones(2, 100, 100)) for layer in network)
    for dropped in (one, other):
        assert dropped.max().item() == pytest.approx(4 / 3)
        assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert ((one == 0) & (other == 0)).float().mean().item() == pytest.approx(1 / 16, abs=0.01)
