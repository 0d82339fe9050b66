"""How fast memory and tensor cores are here: what every other figure is a share of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_check.clock import time_rotated
from benchmarks.gpu_check.context import Context
from benchmarks.gpu_check.sizes import sizes_of
from stream_r1_kernels import QuantizedRows, multiply_rows, quantize_rows


def run(context: Context) -> None:
    s, device = sizes_of(context.small), context.device
    _copy(context)
    tokens, large = s.chunk * s.frame, 256 if context.small else 8192
    shapes = [(large, large, large)]
    shapes += [(tokens, s.width, n) for n in (s.width, 3 * s.width, s.ffn)] + [(tokens, s.ffn, s.width)]
    for rows, inner, columns in shapes:
        a = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        weights = [torch.randn(columns, inner, device=device, dtype=torch.bfloat16) for _ in range(4)]
        calls = [lambda w=w, a=a: torch.nn.functional.linear(a, w) for w in weights]
        seconds, best, rounds = time_rotated(calls, device, 0.4)
        size = {"shape": [rows, inner, columns], "flops": 2 * rows * inner * columns}
        context.record("matmul", **size, seconds=seconds, best=best, rounds=rounds)
        if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9):
            seconds, best, rounds = time_rotated(_in_fp8(a, weights), device, 0.4)
            context.record("matmul8", **size, seconds=seconds, best=best, rounds=rounds)
    x = torch.zeros(8, device=device)
    seconds, best, rounds = time_rotated([lambda: x.add_(1)], device, 0.2)
    context.record("launch", seconds=seconds, best=best, rounds=rounds)


def _in_fp8(a: Tensor, weights: list[Tensor]) -> list[Callable[[], Tensor]]:
    """The same products of rows that are in FP8 already."""
    rows, bias = quantize_rows(a[None]), weights[0].new_zeros(len(weights[0]))
    narrow = [QuantizedRows(*(part[0] for part in quantize_rows(w[None]))) for w in weights]
    return [lambda w=w: multiply_rows(rows, w, bias) for w in narrow]


def _copy(context: Context) -> None:
    size = 1 << (20 if context.small else 30)
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=context.device).normal_()
    target = torch.empty_like(source)
    seconds, best, rounds = time_rotated([lambda: target.copy_(source)], context.device, 0.5)
    context.record("copy", bytes=2 * size, seconds=seconds, best=best, rounds=rounds)
