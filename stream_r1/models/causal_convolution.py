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
    weight, bias = conv.weight, conv.bias
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


class Past:
    """The last input frames of every causal convolution of a network, in the order in which they run.

    `tensors` is None before the first piece. Pieces are started with `rewind()`; each convolution then calls
    `join(x, frames)` once. Gradients flow from one piece to the next unless the caller detaches them.
    """

    def __init__(self, tensors: list[Tensor] | None = None) -> None:
        self.tensors: list[Tensor] = tensors or []
        self._next = 0

    def rewind(self) -> None:
        self._next = 0

    def join(self, x: Tensor, frames: int) -> Tensor:
        """`[past | x]` along time for x [B, C, T, H, W]; keeps the last `frames` frames of it for the next
        piece."""
        index = self.skip(x, frames)
        joined = torch.cat([self.tensors[index], x], dim=2)
        # a copy: a view would keep the whole of `joined` alive until the next piece
        self.tensors[index] = joined[:, :, -frames:].clone()
        return joined

    def skip(self, x: Tensor, frames: int) -> int:
        """Pass over a convolution that does not run in this piece, or is about to; returns its index."""
        if self._next == len(self.tensors):
            # [B, C, frames, H, W] in x's memory format: torch.cat keeps a format that all its inputs agree on
            self.tensors.append(torch.cat([torch.zeros_like(x[:, :, :1])] * frames, dim=2))
        self._next += 1
        return self._next - 1


def causal_conv3d(x: Tensor, conv: nn.Conv3d, past: Past) -> Tensor:
    """Apply a stride-1 `WanCausalConv3d` to the next piece x [B, C, T, H, W] of a video: [B, C', T, H, W]."""
    kernel = conv.kernel_size
    if kernel[0] > 1:
        x = past.join(x, kernel[0] - 1)
    return conv3d(x, conv, (0, kernel[1] // 2, kernel[2] // 2))
