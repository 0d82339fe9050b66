"""Causal 3D convolution with a carried past: what lets a Wan autoencoder run piece by piece.

A `WanCausalConv3d` of diffusers pads time on the left only. Here the same weights are applied to
`[past | x]`, where `past` are the last input frames of the previous piece (zeros before the first), so that
running a video in pieces of any length equals running it at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stream_r1.models.module_weights import weight_of
from stream_r1_kernels import rms_norm_silu

_NORM_EPS = 1e-24  # Wan divides by the length, and by 1e-12 where that is less


class _MkldnnConv3d(torch.autograd.Function):
    """A stride-1 convolution with frozen weights through oneDNN, forward and backward to the input.

    torch sends small float32 batches of one to an unvectorised kernel (`slow_conv3d`), five times slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
        ctx.weight, ctx.padding = weight, padding
        return _mkldnn_conv3d(x, weight, bias, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        # of a stride-1 correlation: a correlation with mirrored weights, inputs and outputs swapped
        weight = ctx.weight.flip(2, 3, 4).transpose(0, 1)
        padding = [k - 1 - p for k, p in zip(ctx.weight.shape[2:], ctx.padding, strict=True)]
        grad = grads[0].contiguous(memory_format=torch.channels_last_3d)
        return _mkldnn_conv3d(grad, weight, None, padding), None, None, None


def _mkldnn_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, [1, 1, 1], [1, 1, 1], 1)


def conv3d(x: Tensor, conv: nn.Conv3d, padding: tuple[int, int, int]) -> Tensor:
    """Stride-1 `conv` of `x` [B, C, T, H, W] with frozen weights, by the fastest route this machine has."""
    weight, bias = weight_of(conv), weight_of(conv, "bias")
    on_onednn = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not weight.requires_grad
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )
    if not on_onednn:
        return functional.conv3d(x, weight, bias, padding=padding)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    if x.requires_grad and torch.is_grad_enabled():
        return _MkldnnConv3d.apply(x, weight, bias, list(padding))
    return _mkldnn_conv3d(x, weight, bias, list(padding))


class PastFrames:
    """The last input frames of every causal convolution of a network, in the order in which they run.

    `tensors` is empty before the first piece. Pieces are started with `rewind()`; each convolution then calls
    `join`, or `last` and `keep`, once. Gradients flow from one piece to the next unless the caller detaches
    them.
    """

    def __init__(self, tensors: list[Tensor] | None = None) -> None:
        self.tensors: list[Tensor] = tensors or []
        self._next = 0

    def rewind(self) -> None:
        self._next = 0

    def last(self, x: Tensor, frames: int) -> Tensor:
        """What the next convolution, whose input is like x [B, C, T, H, W], kept: [B, C, frames, H, W].

        `frames` zeros before the first piece; channels-last.
        """
        if self._next == len(self.tensors):
            size = (*x.shape[:2], frames, *x.shape[3:])
            empty = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
            self.tensors.append(empty.zero_())
        self._next += 1
        return self.tensors[self._next - 1]

    def keep(self, joined: Tensor, frames: int) -> None:
        """Keep the last `frames` frames of the input of the convolution that called `last`."""
        # a copy: a view would keep the whole of `joined` alive until the next piece
        self.tensors[self._next - 1] = joined[:, :, -frames:].clone()

    def join(self, x: Tensor, frames: int) -> Tensor:
        """`[past | x]` along time for x [B, C, T, H, W]; keeps the last `frames` frames of it."""
        joined = torch.cat([self.last(x, frames), x], dim=2)
        self.keep(joined, frames)
        return joined


def causal_conv3d(x: Tensor, conv: nn.Conv3d, past: PastFrames) -> Tensor:
    """Apply a stride-1 `WanCausalConv3d` to the next piece x [B, C, T, H, W] of a video: [B, C', T, H, W]."""
    kernel = conv.kernel_size
    if kernel[0] > 1:
        x = past.join(x, kernel[0] - 1)
    return conv3d(x, conv, (0, kernel[1] // 2, kernel[2] // 2))


def norm_silu_conv3d(x: Tensor, weight: Tensor, conv: nn.Conv3d, past: PastFrames) -> Tensor:
    """The same of silu(RMSNorm(x) * weight); weight [C], the norm over the channels."""
    kernel = conv.kernel_size
    before = past.last(x, kernel[0] - 1)
    rows = rms_norm_silu(_rows(x), weight, _rows(before), eps=_NORM_EPS)
    joined = rows.unflatten(1, (-1, *x.shape[3:])).movedim(-1, 1)  # [B, C, past + T, H, W]
    past.keep(joined, kernel[0] - 1)
    return conv3d(joined, conv, (0, kernel[1] // 2, kernel[2] // 2))


def _rows(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, T H W, C], a view where x is channels-last."""
    return x.movedim(1, -1).flatten(1, 3)
