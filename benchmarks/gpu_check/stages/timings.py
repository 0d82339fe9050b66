"""Every op beside what somebody would take instead: one record an implementation, with its error."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu_check.clock import time_rotated
from benchmarks.gpu_check.context import Context
from benchmarks.gpu_check.ops import OpAtSize, Tensors, errors, ops
from benchmarks.gpu_check.sizes import sizes_of

L2 = 64 << 20  # bytes; of GPUs whose driver does not say


def run(context: Context) -> None:
    for case in ops(sizes_of(context.small)):
        copies = _copies(context, case)
        expected = case.expected(copies[0])
        for name, call in case.backends(copies[0]).items():
            facts = {"name": f"{case.name}: {name}", "case": case.name, "op": case.op, "backend": name}
            facts |= {"bytes": case.work[0], "flops": case.work[1]}
            try:
                off = max(errors(case.results(call, copies[0]), expected))
                calls = [partial(case.results, call, inputs) for inputs in copies]
                seconds, best, rounds = time_rotated(calls, context.device, 0.02 if context.small else 0.5)
            except Exception as error:  # of any kind: one implementation must not end the others' timing
                context.record("timing", **facts, seconds=None, why=f"{type(error).__name__}: {error}"[:300])
                continue
            error = off if off != float("inf") else None
            context.record("timing", **facts, seconds=seconds, best=best, rounds=rounds, error=error)
        del copies, expected
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


def _copies(context: Context, case: OpAtSize) -> list[Tensors]:
    """Inputs in different memory, in all twice what the L2 cache holds; at most 8."""
    first = case.inputs(context.device, torch.bfloat16)
    size = sum(x.numel() * x.element_size() for x in first)
    cache = L2
    if context.device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(context.device), "L2_cache_size", 0) or L2
    count = 2 if context.small else max(2, min(8, 2 * cache // size + 1))
    return [first, *(case.inputs(context.device, torch.bfloat16, seed) for seed in range(1, count))]
