"""The U-Net."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from limner.models import staged
from limner.models.bare import Convolution, GroupNorm, LayerNorm, Linear
from limner.models.plain.layers import Layers, Network, new_attention, new_resnet


class UNet(Network):
    """The layers of a UNet2DConditionModel, which `staged.Staged` calls."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError for settings that `staged` does not know."""
        if not staged.fits(config):
            raise ValueError("another kind of U-Net")
        known = {**staged.SIZES, **config}
        channels, groups, eps = known["block_out_channels"], known["norm_num_groups"], known["norm_eps"]
        heads = known["num_attention_heads"] or known["attention_head_dim"]  # which means their number, too
        heads = [heads] * len(channels) if isinstance(heads, int) else heads
        time = known["time_embedding_dim"] or 4 * channels[0]
        entering, leaving = known["conv_in_kernel"], known["conv_out_kernel"]

        def transformer(width: int, of: int) -> Layers:
            inner = [
                Layers(
                    norm1=LayerNorm(width),
                    attn1=new_attention(width, width, of),
                    norm2=LayerNorm(width),
                    attn2=new_attention(width, known["cross_attention_dim"], of),
                    norm3=LayerNorm(width),
                    ff=Layers(net=[Layers(proj=Linear(width, 8 * width)), nn.Identity(), Linear(4 * width, width)]),
                )
                for _ in range(known["transformer_layers_per_block"])
            ]
            linear = known["use_linear_projection"]
            project = [Linear(width, width) if linear else Convolution(width, width, 1) for _ in range(2)]
            norm = GroupNorm(groups, width, 1e-6)
            return Layers(
                norm=norm,
                proj_in=project[0],
                transformer_blocks=inner,
                proj_out=project[1],
                use_linear_projection=linear,
            )

        def block(kind: str, sizes: Sequence[tuple[int, int]], of: int) -> dict[str, Any]:
            attends = kind.startswith("CrossAttn")
            if attends and sizes[0][1] % of:
                raise ValueError("heads that Diffusers would make narrower")
            return {
                "resnets": [new_resnet(*both, groups, eps, time) for both in sizes],
                "attentions": [transformer(outputs, of) for _, outputs in sizes] if attends else [],
            }

        skipped, hidden, downs, ups = [channels[0]], channels[0], [], []
        for i, (kind, width) in enumerate(zip(known["down_block_types"], channels, strict=True)):
            sizes = [(hidden if j == 0 else width, width) for j in range(known["layers_per_block"])]
            hidden, last = width, i == len(channels) - 1
            skipped += [width] * (len(sizes) if last else len(sizes) + 1)
            halved = None if last else [Layers(conv=Convolution(width, width, 3, stride=2, padding=1))]
            downs.append(Layers(**block(kind, sizes, heads[i]), downsamplers=halved))
        middle = Layers(
            resnets=[new_resnet(hidden, hidden, groups, eps, time) for _ in range(2)],
            attentions=[transformer(hidden, heads[-1])],
        )
        for i, kind in zip(reversed(range(len(channels))), known["up_block_types"], strict=True):
            sizes = []
            for _ in range(known["layers_per_block"] + 1):
                sizes.append((hidden + skipped.pop(), channels[i]))
                hidden = channels[i]
            doubled = [Layers(conv=Convolution(hidden, hidden, 3, padding=1))] if i else None
            ups.append(Layers(**block(kind, sizes, heads[i]), upsamplers=doubled))
        super().__init__(
            conv_in=Convolution(known["in_channels"], channels[0], entering, padding=(entering - 1) // 2),
            time_embedding=Time(channels[0], time, known["time_cond_proj_dim"]),
            down_blocks=downs,
            mid_block=middle,
            up_blocks=ups,
            conv_norm_out=GroupNorm(groups, hidden, eps),
            conv_out=Convolution(hidden, known["out_channels"], leaving, padding=(leaving - 1) // 2),
            config=known,
        )

    def get_time_embed(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Waves of a timestep () or (N,), for latents (N, C, h, w) -> (N, E), as Ho et al. 2006.11239 have them."""
        width = self.config["block_out_channels"][0]
        half = width // 2
        numbers = torch.arange(half, dtype=torch.float32, device=sample.device)
        frequencies = torch.exp(-math.log(10_000) * numbers / (half - self.config["freq_shift"]))
        angles = timestep.reshape(-1).to(sample.device).expand(sample.shape[0])[:, None].float() * frequencies[None, :]
        waves = [angles.sin(), angles.cos()]
        joined = torch.cat(waves[::-1] if self.config["flip_sin_to_cos"] else waves, dim=-1)
        return pad(joined, (0, width % 2)).to(sample.dtype)


class Time(Layers):
    """TimestepEmbedding."""

    def __init__(self, inputs: int, outputs: int, condition: int | None) -> None:
        super().__init__(
            linear_1=Linear(inputs, outputs),
            cond_proj=None if condition is None else Linear(condition, inputs, bias=False),
            linear_2=Linear(outputs, outputs),
        )

    def forward(self, waves: Tensor, condition: Tensor | None = None) -> Tensor:
        """(N, E), and the embedding of guidance where it is an input (N or 1, E') -> (N, E'')."""
        given = waves if condition is None else waves + self.cond_proj(condition)
        embedded: Tensor = self.linear_2(silu(self.linear_1(given)))
        return embedded
