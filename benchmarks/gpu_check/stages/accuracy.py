"""Every op at full size in bfloat16 against float32, its outputs on poisoned memory, and on a second stream.

What is right is plain softmax in float32, in pieces; no library's attention is taken for the truth.
"""

from __future__ import annotations

import torch

from benchmarks.gpu_check.context import Context
from benchmarks.gpu_check.ops import Tensors, errors, ops
from benchmarks.gpu_check.sizes import sizes_of

ALLOWED = 0.02  # of the largest value: five roundings of bfloat16, and what a few thousand terms add


def run(context: Context) -> None:
    for case in ops(sizes_of(context.small)):
        inputs = case.inputs(context.device, torch.bfloat16)
        expected = case.expected(inputs)
        for name, call in case.backends(inputs).items():
            facts = {"name": f"{case.name}: {name}", "op": case.op, "backend": name}
            try:
                _poison(context, [*expected, *inputs])
                got = case.results(call, inputs)
                context.synchronize()
                off = errors(got, expected)
                same = _again_on_another_stream(context, case.results, call, inputs, got)
            except Exception as error:  # of any kind: the next backend is to be looked at all the same
                context.record("accuracy", **facts, right=None, why=f"{type(error).__name__}: {error}"[:300])
                continue
            ours = name in ("cuda", "triton", "cpu")
            right = max(off) <= ALLOWED
            why = "" if right else f"off by {max(off):.2g} of the largest value, {ALLOWED} allowed"
            if ours and same is False:
                right, why = False, "other numbers on another stream"
            off = [x if x != float("inf") else None for x in off]  # JSON has no infinity
            context.record("accuracy", **facts, right=right, why=why, errors=off, same_on_stream=same)
        del inputs, expected


def _poison(context: Context, like: list[torch.Tensor]) -> None:
    """Leaves NaN in the memory that the next call's results will get from the allocator."""
    left = [torch.full_like(x, torch.nan, requires_grad=False) for x in like for _ in range(2)]
    del left
    context.synchronize()


def _again_on_another_stream(context: Context, results, call, inputs: Tensors, first: Tensors) -> bool | None:  # type: ignore[no-untyped-def]
    """Whether it gives the same bits there; None without a GPU. (torch's own gradients may not.)"""
    if context.device.type != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = results(call, inputs)
    stream.synchronize()
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
