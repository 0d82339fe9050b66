"""How fast memory and tensor cores are here: what every other figure is a share of."""

from __future__ import annotations

import torch

from benchmarks.gpu_check.clock import time_rotated
from benchmarks.gpu_check.context import Context
from benchmarks.gpu_check.sizes import sizes_of


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
        flops = 2 * rows * inner * columns
        context.record(
            "matmul", shape=[rows, inner, columns], flops=flops, seconds=seconds, best=best, rounds=rounds
        )
    x = torch.zeros(8, device=device)
    seconds, best, rounds = time_rotated([lambda: x.add_(1)], device, 0.2)
    context.record("launch", seconds=seconds, best=best, rounds=rounds)


def _copy(context: Context) -> None:
    size = 1 << (20 if context.small else 30)
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=context.device).normal_()
    target = torch.empty_like(source)
    seconds, best, rounds = time_rotated([lambda: target.copy_(source)], context.device, 0.5)
    context.record("copy", bytes=2 * size, seconds=seconds, best=best, rounds=rounds)
