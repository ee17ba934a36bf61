"""A U-Net taken apart by what its numbers depend on, so that nothing is computed twice while a picture is drawn.

What a prompt alone decides, the keys and values of cross-attention, is computed once a prompt. What both passes of
guidance have in common, all that comes before the first cross-attention, is computed once for both. The rest is
Diffusers' UNet2DConditionModel, layer by layer, on its own weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention, silu

SIZES: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "cross_attention_dim": 1280,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_embedding_dim": None,
    "time_cond_proj_dim": None,
    "use_linear_projection": False,
    "upcast_attention": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "dropout": 0.0,
}
"""Settings of a UNet2DConditionModel that may be anything here, as they are where a file leaves them out."""
FIXED: dict[str, Any] = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "attention_type": "default",
    "addition_embed_type_num_heads": 64,
}
"""Those that must be as Diffusers has them by default. All others must be off."""
BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}


def fits(config: Mapping[str, Any]) -> bool:
    """Whether a U-Net of this config is one that `Staged` knows: Stable Diffusion's, of any size."""
    known = {**SIZES, **{name: value for name, value in config.items() if not name.startswith("_")}}
    return (
        all(name in SIZES or (value == FIXED[name] if name in FIXED else not value) for name, value in known.items())
        and {*known["down_block_types"], *known["up_block_types"]} <= BLOCKS
        and known["norm_num_groups"] is not None
    )


class Network(Protocol):
    """What draws with a U-Net that was taken apart."""

    def keys_and_values(self, states: Tensor) -> Sequence[Tensor]:
        """Keys, values, keys, values, ... of the cross-attentions, for states (N, L, D): each (N, heads, L, width).
        Those of the outermost blocks come first.
        """

    def step(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt: Sequence[Tensor],
        condition: Tensor | None = None,
        deep: Any = None,
    ) -> tuple[Tensor, Any]:
        """What is predicted for latents (N, C, h, w) at a timestep () or (N,), for a prompt's keys and values of one
        pass or both, (N, C, h, w) or (2N, C, h, w); and what the outermost blocks are given by those between them, as
        it likes, which are not computed where `deep` is that. `condition` is the embedding of guidance, where it is an
        input.
        """


class Passes:
    """A U-Net as the denoising loop calls it for one drawing: as Diffusers', but that latents are given once a picture,
    also where the states have two passes.
    """

    shares_latents = True

    def __init__(self, config: Any, network: Network, reuse: int = 1) -> None:
        """With `reuse` above 1 all but the outermost blocks are computed at each so many steps alone, since their
        answer changes little from step to step (DeepCache, Ma et al. 2312.00858).
        """
        self.config, self.network, self.reuse = config, network, reuse
        self._prompt: tuple[Tensor, Sequence[Tensor]] | None = None
        self._deep: Any = None
        self._calls = 0

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """latents (N, C, h, w), timestep () or (N,), states (N, L, D), or (2N, L, D) of both passes, one behind the
        other -> what is predicted, (N, C, h, w) or (2N, C, h, w), in a tuple as from Diffusers.

        What the last states need is kept, as they are the same at each step.
        """
        assert not return_dict
        if self._prompt is None or self._prompt[0] is not encoder_hidden_states:
            self._prompt = encoder_hidden_states, self.network.keys_and_values(encoder_hidden_states)
        deep = self._deep if self._calls % self.reuse else None
        predicted, self._deep = self.network.step(latents, timestep, self._prompt[1], timestep_cond, deep)
        self._calls += 1
        return (predicted,)


class Staged(nn.Module):
    """A U-Net that `fits`, taken apart; it shares the weights. A `Network`."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        outermost = _attentions(unet.down_blocks[0], unet.up_blocks[-1])
        between = _attentions(*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1])
        self.attentions = [*outermost, *between]
        self.outermost = len(outermost)
        """So many of the attentions are read where `deep` is given."""

    def keys_and_values(self, states: Tensor) -> list[Tensor]:
        """As `Network` says."""
        return [
            heads(project(states), attention.heads)
            for attention in self.attentions
            for project in (attention.to_k, attention.to_v)
        ]

    def step(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt: Sequence[Tensor],
        condition: Tensor | None = None,
        deep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Network` says."""
        unet = self.unet
        time = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timestep), condition)  # (N, E)
        layers = _Layers(silu(time), dict(zip(self.attentions, zip(prompt[::2], prompt[1::2]))))
        skipped = [unet.conv_in(latents)]
        layers.down(unet.down_blocks[0], skipped)
        outermost = list(skipped)
        if deep is None:
            deep = self._between(layers, skipped)
        hidden = layers.up(unet.up_blocks[-1], deep, outermost)
        return unet.conv_out(silu(unet.conv_norm_out(hidden))), deep

    def _between(self, layers: _Layers, skipped: list[Tensor]) -> Tensor:
        """From what the first block leaves to what the last is given (2N, C, h, w)."""
        unet = self.unet
        for number, block in enumerate(unet.down_blocks):
            if number:
                layers.down(block, skipped)
            for downsampler in block.downsamplers or ():
                skipped.append(downsampler.conv(skipped[-1]))
        first, *rest = unet.mid_block.resnets
        hidden = layers.resnet(first, skipped[-1])
        for transformer, resnet in zip(unet.mid_block.attentions, rest):
            hidden = layers.resnet(resnet, layers.transformed(transformer, hidden))
        for block in unet.up_blocks[:-1]:
            hidden = layers.up(block, hidden, skipped)
            for upsampler in block.upsamplers or ():
                hidden = upsampler.conv(interpolate(hidden, size=skipped[-1].shape[2:], mode="nearest"))
        return hidden


def _attentions(*blocks: Any) -> list[Any]:
    """The cross-attentions of blocks, in their order."""
    transformers = [transformer for block in blocks for transformer in getattr(block, "attentions", ())]
    return [inner.attn2 for transformer in transformers for inner in transformer.transformer_blocks]


@dataclass
class _Layers:
    """Diffusers' layers at one timestep for one prompt."""

    time: Tensor
    """What the residual blocks read of the timestep (N, E)."""
    prompt: dict[Any, tuple[Tensor, Tensor]]
    """Keys and values of each cross-attention."""

    def down(self, block: Any, skipped: list[Tensor]) -> None:
        """The layers of DownBlock2D or CrossAttnDownBlock2D, each of which leaves one more in `skipped`."""
        for resnet, transformer in zip_longest(block.resnets, getattr(block, "attentions", ())):
            skipped.append(self.transformed(transformer, self.resnet(resnet, skipped[-1])))

    def up(self, block: Any, hidden: Tensor, skipped: list[Tensor]) -> Tensor:
        """The layers of UpBlock2D or CrossAttnUpBlock2D, each of which takes the last of `skipped`."""
        for resnet, transformer in zip_longest(block.resnets, getattr(block, "attentions", ())):
            both = torch.cat([hidden, _as_many(skipped.pop(), hidden)], dim=1)
            hidden = self.transformed(transformer, self.resnet(resnet, both))
        return hidden

    def resnet(self, block: Any, given: Tensor) -> Tensor:
        """ResnetBlock2D. (N, C, h, w) -> (N, C', h, w)."""
        shift = block.time_emb_proj(self.time)[:, :, None, None]  # (N, C', 1, 1)
        hidden = block.conv1(silu(block.norm1(given)))
        hidden = hidden + _as_many(shift, hidden)
        hidden = block.conv2(silu(block.norm2(hidden)))
        return hidden + (given if block.conv_shortcut is None else block.conv_shortcut(given))

    def transformed(self, block: Any, given: Tensor) -> Tensor:
        """Transformer2DModel, or nothing where there is none. (N, C, h, w) -> (N, C, h, w), or twice as many rows where
        both passes part in it.
        """
        if block is None:
            return given
        height, width = given.shape[2:]
        linear = block.use_linear_projection
        hidden = block.norm(given) if linear else block.proj_in(block.norm(given))
        hidden = hidden.flatten(2).transpose(1, 2)  # (N, h w, C)
        hidden = block.proj_in(hidden) if linear else hidden
        for inner in block.transformer_blocks:
            hidden = self._attended(inner, hidden)
        hidden = block.proj_out(hidden) if linear else hidden
        hidden = hidden.transpose(1, 2).reshape(hidden.shape[0], -1, height, width)  # (N, C, h, w)
        hidden = hidden if linear else block.proj_out(hidden)
        return hidden + _as_many(given, hidden)

    def _attended(self, block: Any, hidden: Tensor) -> Tensor:
        """BasicTransformerBlock. (N, T, C) -> (N, T, C), or twice as many rows."""
        attention, normed = block.attn1, block.norm1(hidden)
        projected = [
            heads(project(normed), attention.heads) for project in (attention.to_q, attention.to_k, attention.to_v)
        ]
        hidden = hidden + joined(attention, *projected)
        keys, values = self.prompt[block.attn2]
        queries = heads(block.attn2.to_q(block.norm2(hidden)), block.attn2.heads)
        hidden = _as_many(hidden, keys) + joined(block.attn2, _as_many(queries, keys), keys, values)
        towards, gate = block.ff.net[0].proj(block.norm3(hidden)).chunk(2, dim=-1)
        return hidden + block.ff.net[2](towards * gelu(gate))


def heads(tokens: Tensor, count: int) -> Tensor:
    """(N, T, C) -> (N, heads, T, width)."""
    return tokens.reshape(*tokens.shape[:2], count, -1).transpose(1, 2)


def joined(attention: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(N, heads, T, width), (N, heads, L, width) twice -> (N, T, C)."""
    seen = scaled_dot_product_attention(queries, keys, values)
    out: Tensor = attention.to_out[0](seen.transpose(1, 2).flatten(2))
    return out


def _as_many(tensor: Tensor, like: Tensor) -> Tensor:
    """The rows of a tensor as often, one behind the other, as makes them as many as those of another."""
    times = like.shape[0] // tensor.shape[0]  # as len() takes longer
    return tensor if times == 1 else torch.cat([tensor] * times)
