"""Layers that are slow in bf16 on a CPU as PyTorch has them, computed in another way while they learn.

Weights and answers are the same but for rounding; docs/experiments.md has the times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

ROWS = 1024  # places of all images together, up to which oneDNN's way back to the weights is slower than a product
LARGE = 2**20  # numbers from which on it pays to normalise block by block
BLOCK = 2**17  # numbers of a block, so that what is computed on the way stays in a core's cache


def quicken(network: nn.Module) -> None:
    """Let a network that is on a CPU learn faster there, above all in bf16; elsewhere nothing changes."""
    from diffusers.models.resnet import ResnetBlock2D

    for layer in network.modules():
        if next(layer.parameters(), torch.empty(0)).device.type != "cpu":
            continue
        if type(layer) is nn.GroupNorm and layer.affine:
            layer.__class__ = GroupNorm
        elif type(layer) is nn.Conv2d and layer.groups == 1 and layer.dilation == (1, 1) and layer.bias is not None:
            layer.__class__ = Convolution
        elif isinstance(layer, ResnetBlock2D):
            layer.register_forward_pre_hook(_keep_layout)


def _keep_layout(block: nn.Module, given: tuple[Any, ...]) -> None:
    """Diffusers puts the channels first in what a shortcut reads as long as the block's own flag says that it trains,
    which is to spare DDP a warning; the convolution and its way back then turn all of it again."""
    del given
    block.training = False  # which no layer in the block looks at


def _slow() -> bool:
    """Whether the arithmetic is one that PyTorch's own kernels are slow in."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()
    )


class Convolution(nn.Conv2d):
    """A convolution whose way back to the weights is a product of matrices where there are few places."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        places = x.shape[0] * x.shape[2] * x.shape[3] // (self.stride[0] * self.stride[1])
        plain = isinstance(self.padding, tuple) and self.padding_mode == "zeros"
        if not (_slow() and plain and places <= ROWS and self.weight.requires_grad):
            return super().forward(x)
        assert self.bias is not None  # or `quicken` would have left it
        values = (value.to(torch.bfloat16) for value in (x, self.weight, self.bias))
        answer: Tensor = _Convolved.apply(*values, self.stride, self.padding)
        return answer


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (down, across), (top, left) = ctx.stride, ctx.padding
        outputs, inputs, height, width = weight.shape
        back = None
        if ctx.needs_input_grad[0]:
            settings = (ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1)
            back = torch.ops.aten.convolution_backward(slope, x, weight, [outputs], *settings, [True, False, False])[0]
        padded = pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
        seen = padded.unfold(1, height, down).unfold(2, width, across)  # (N, H', W', C, h, w)
        rows = seen.permute(0, 1, 2, 4, 5, 3).reshape(-1, height * width * inputs)  # what each place is computed from
        slopes = slope.permute(0, 2, 3, 1).reshape(-1, outputs)
        kernels = (slopes.T @ rows).view(outputs, height, width, inputs).permute(0, 3, 1, 2)
        return back, kernels, slopes.sum(dim=0), None, None


class GroupNorm(nn.GroupNorm):
    """A group norm that computes in fp32, as autocast has it do on a GPU, from bf16 to bf16 and block by block."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...)."""
        if not _slow() or x.dtype != torch.bfloat16:
            return super().forward(x)
        if x.dim() != 4 or x.numel() < LARGE:
            return super().forward(x.float()).to(x.dtype)
        answer: Tensor = _Normalised.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return answer


def _channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H * W, C), the same memory where the channels lie last in it."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        count, channels, height, width = x.shape
        answer, mean, scale = torch.empty_like(x), *torch.empty(2, count, groups)
        for block in _blocks(x):
            values = x[block].float()
            answer[block], mean[block], scale[block] = torch.native_group_norm(
                values, weight, bias, len(values), channels, height * width, groups, eps
            )
        ctx.save_for_backward(x, weight, mean, scale)
        return answer

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """With n = (x - mean) * scale, of which a group's mean is 0 and its mean square 1:
        scale * (g - mean(g) - n * mean(g * n)), where g is the slope times the weight and means are the group's.
        """
        x, weight, mean, scale = ctx.saved_tensors
        count, channels, height, width = x.shape
        groups = mean.shape[1]
        each = channels // groups

        def by_group(sums: Tensor) -> Tensor:
            """Weighted means over the groups (B, G) of sums over places (B, C)."""
            return (sums * weight).unflatten(1, (groups, each)).sum(dim=2) / (each * height * width)

        def by_channel(values: Tensor) -> Tensor:
            """(B, G) -> (B, 1, C)."""
            return values.repeat_interleave(each, dim=1)[:, None]

        back = torch.empty_like(x)
        slope = slope.contiguous(memory_format=torch.channels_last)
        plain, normed = torch.empty(2, count, channels)  # sums over places of the slope, and of its product with n
        for block in _blocks(x):
            values, slopes = _channels_last(x[block]).float(), _channels_last(slope[block]).float()  # (B, H * W, C)
            middle, wide = mean[block], scale[block]
            plain[block] = slopes.sum(dim=1)
            products = (slopes * values).sum(dim=1)
            normed[block] = (products - by_channel(middle)[:, 0] * plain[block]) * by_channel(wide)[:, 0]
            # The same as a * slope + b * x + c, each by channel
            b = -wide.square() * by_group(normed[block])
            c = -wide * by_group(plain[block]) - b * middle
            slopes.mul_(by_channel(wide) * weight).addcmul_(values, by_channel(b)).add_(by_channel(c))
            _channels_last(back[block]).copy_(slopes)
        return back, normed.sum(dim=0), plain.sum(dim=0), None, None


def _blocks(x: Tensor) -> list[slice]:
    """Images that are normalised together."""
    size = max(1, BLOCK // x[0].numel())
    return [slice(start, start + size) for start in range(0, len(x), size)]
