"""The VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, silu

from limner.models import staged
from limner.models.bare import Convolution, GroupNorm
from limner.models.plain.layers import Layers, Network, new_attention, new_resnet

DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
"""Settings of an AutoencoderKL that its layers depend on, as they are where a file leaves them out."""


class Vae(Network):
    """AutoencoderKL."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError for settings that are not known here."""
        known = {**DEFAULTS, **config}
        kinds = {*known["down_block_types"], *known["up_block_types"], known["act_fn"]}
        if kinds != {*DEFAULTS["down_block_types"], *DEFAULTS["up_block_types"], DEFAULTS["act_fn"]}:
            raise ValueError("another kind of VAE")
        channels, layers, latent = known["block_out_channels"], known["layers_per_block"], known["latent_channels"]
        groups = known["norm_num_groups"]

        def blocks(widths: Sequence[int], count: int, **scaler: Callable[[int], nn.Module]) -> Iterator[Layers]:
            (name, new), *_ = scaler.items()
            for i, width in enumerate(widths):
                given = widths[max(i - 1, 0)]
                resnets = [new_resnet(width if j else given, width, groups, 1e-6) for j in range(count)]
                last = i == len(widths) - 1
                yield Layers(resnets=resnets, **{name: None if last else [Layers(conv=new(width))]})

        def half(inputs: int, outputs: int, ends: Sequence[int], **rest: Any) -> Layers:
            first, last = ends
            return Layers(
                conv_in=Convolution(inputs, first, 3, padding=1),
                mid_block=self._middle(channels[-1], groups, attends=known["mid_block_add_attention"]),
                conv_norm_out=GroupNorm(groups, last, 1e-6),
                conv_out=Convolution(last, outputs, 3, padding=1),
                **rest,
            )

        down = blocks(channels, layers, downsamplers=lambda width: Convolution(width, width, 3, stride=2))
        up = blocks(channels[::-1], layers + 1, upsamplers=lambda width: Convolution(width, width, 3, padding=1))
        ends = channels[0], channels[-1]
        super().__init__(
            encoder=half(known["in_channels"], 2 * latent, ends, down_blocks=[*down]),
            decoder=half(latent, known["out_channels"], ends[::-1], up_blocks=[*up]),
            quant_conv=Convolution(2 * latent, 2 * latent, 1) if known["use_quant_conv"] else None,
            post_quant_conv=Convolution(latent, latent, 1) if known["use_post_quant_conv"] else None,
            config=known,
        )

    @staticmethod
    def _middle(width: int, groups: int, *, attends: bool) -> Layers:
        attention = new_attention(width, width, 1, bias=True)
        attention.group_norm = GroupNorm(groups, width, 1e-6)
        return Layers(
            resnets=[new_resnet(width, width, groups, 1e-6) for _ in range(2)],
            attentions=[attention] if attends else [],
        )

    def encode(self, pixels: Tensor) -> Any:
        """(N, 3, H, W) -> moments (N, 2C, h, w), as `latent_dist.parameters`."""
        half = self.encoder
        hidden = half.conv_in(pixels)
        for block in half.down_blocks:
            for resnet in block.resnets:
                hidden = _residual(resnet, hidden)
            for downsampler in block.downsamplers or ():
                hidden = downsampler.conv(pad(hidden, (0, 1, 0, 1)))
        moments = _finished(half, _mixed(half.mid_block, hidden))
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=moments))

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """(N, C, h, w) -> (N, 3, H, W), in a tuple as from Diffusers."""
        assert not return_dict
        half = self.decoder
        latents = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        hidden = _mixed(half.mid_block, half.conv_in(latents))
        for block in half.up_blocks:
            for resnet in block.resnets:
                hidden = _residual(resnet, hidden)
            for upsampler in block.upsamplers or ():
                hidden = upsampler.conv(interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return (_finished(half, hidden),)


def _residual(block: Any, given: Tensor) -> Tensor:
    """ResnetBlock2D without a timestep. (N, C, h, w) -> (N, C', h, w)."""
    hidden = block.conv1(silu(block.norm1(given)))
    hidden = block.conv2(silu(block.norm2(hidden)))
    shortcut: Tensor = given if block.conv_shortcut is None else block.conv_shortcut(given)
    return shortcut + hidden


def _mixed(block: Any, hidden: Tensor) -> Tensor:
    """UNetMidBlock2D. (N, C, h, w) -> (N, C, h, w)."""
    first, second = block.resnets
    hidden = _residual(first, hidden)
    for attention in block.attentions:
        tokens = hidden.flatten(2)  # (N, C, h w)
        normed = attention.group_norm(tokens).transpose(1, 2)
        projected = (staged.heads(p(normed), 1) for p in (attention.to_q, attention.to_k, attention.to_v))
        hidden = staged.joined(attention, *projected).transpose(1, 2).reshape(hidden.shape) + hidden
    return _residual(second, hidden)


def _finished(half: Any, hidden: Tensor) -> Tensor:
    """The last layers of encoder or decoder."""
    finished: Tensor = half.conv_out(silu(half.conv_norm_out(hidden)))
    return finished
