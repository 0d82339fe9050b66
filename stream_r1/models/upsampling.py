"""Nearest-neighbour doubling and a 3 x 3 convolution as one convolution of the small picture.

Three rows of a picture twice as high are two rows of the picture: for a pixel with an even row the first tap
reads one and the other two, together, the next; for an odd row the first two, together, and the last. So each
of the four pixels of a doubled cell is a 2 x 2 convolution with sums of the taps: 16 products instead of 36.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from stream_r1.models.module_weights import weight_of


def double_and_convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Of x [N, C, H, W]: `conv`, 3 x 3 with padding 1, of x twice as high and wide: [N, C', 2 H, 2 W].

    Channels-last, differentiable in x and the weights.
    """
    count, _, height, width = x.shape
    taps, bias = weight_of(conv), weight_of(conv, "bias")
    weight = _fold(_fold(taps.float(), 2), 4)  # [b, a, C', C, 2, 2]: columns' parity, rows'
    weight = weight.permute(1, 0, 2, 4, 5, 3).flatten(0, 2).to(taps.dtype)
    weight = weight.movedim(-1, 1)  # [4 C', C, 2, 2], channels-last
    bias = None if bias is None else bias.repeat(4)
    x = x.contiguous(memory_format=torch.channels_last)
    y = functional.conv2d(x, weight, bias, padding=1)  # [N, 4 C', H + 1, W + 1]
    y = y.movedim(1, -1).unflatten(-1, (2, 2, -1))
    out = y.new_empty(count, height, 2, width, 2, conv.out_channels)
    for a in range(2):
        for b in range(2):
            out[:, :, a, :, b] = y[:, a : a + height, b : b + width, a, b]
    return out.flatten(3, 4).flatten(1, 2).movedim(-1, 1)


def _fold(weight: Tensor, dim: int) -> Tensor:
    """Three taps along `dim` -> [2, ...] with two taps there: of an even and of an odd pixel."""
    first, middle, last = weight.unbind(dim)
    even, odd = (first, middle + last), (first + middle, last)
    return torch.stack([torch.stack(taps, dim) for taps in (even, odd)])
