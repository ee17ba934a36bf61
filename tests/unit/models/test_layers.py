"""Of a given U-Net only what is asked for is trained."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor

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
