"""What this machine can do at most: a copy in memory, and matmuls."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

COPIED = 2**25  # floats: 128 MiB, more than a cache holds
SIDE = 1536  # of the matrices


def measure() -> dict[str, float]:
    """Of "copy" the bytes read and written a second, of "matmul float32" and "matmul bfloat16" the flops."""
    source = torch.randn(COPIED)
    to = torch.empty_like(source)
    ceilings = {"copy": 2 * 4 * COPIED / _median_seconds(lambda: to.copy_(source))}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in "ab")
        out = torch.empty_like(a)
        name = str(dtype).removeprefix("torch.")
        seconds = _median_seconds(lambda out=out, a=a, b=b: torch.mm(a, b, out=out))  # type: ignore[misc]
        ceilings[f"matmul {name}"] = 2 * SIDE**3 / seconds
    return ceilings


def _median_seconds(run: Callable[[], object], at_least: int = 7, budget: float = 1.0) -> float:
    run()
    times: list[float] = []
    while len(times) < at_least or (sum(times) < budget and len(times) < 50):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)
