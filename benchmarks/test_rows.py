"""Norm, rotary and gated add, forward and with backward

    pytest benchmarks/test_rows.py --benchmark-only

The sizes are those of a denoising pass of the tiny world and of a chunk at 480p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.case import DTYPES, Case, Run, check_and_time, compiled, parametrize, with_grads
from stream_r1_kernels import RotaryGrid, gated_add, modulated_norm, qk_norm_rotary

SIZES = {  # batch, grid of tokens, heads, head width
    "B1-T84-D256": (1, (3, 4, 7), 4, 64),
    "B8-T84-D320": (8, (3, 4, 7), 5, 64),
    "B1-T4680-D1536": (1, (3, 30, 52), 12, 128),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def rotary_case(size: str, dtype: str, train: bool) -> dict[str, Run]:
    batch, grid, heads, head = SIZES[size]
    width, tokens = heads * head, grid[0] * grid[1] * grid[2]
    cos, sin = RotaryGrid(head).phases(0, *grid)
    fused = torch.randn(batch, tokens, 3 * width).to(DTYPES[dtype])  # q, k and v are slices of one projection
    q, k = (x.requires_grad_(train) for x in fused.split(width, -1)[:2])
    weights = [torch.randn(width).to(DTYPES[dtype]).requires_grad_(train) for _ in "qk"]
    tables = published.phase_table(head)

    def published_code() -> tuple[Tensor, ...]:
        return tuple(
            published.norm_rotary(x, w, tables, grid, heads, 1e-6)
            for x, w in zip((q, k), weights, strict=True)
        )

    reference = partial(qk_norm_rotary, num_heads=heads, backend="reference")
    calls: dict[str, Run] = {
        "ours": partial(qk_norm_rotary, q, k, *weights, cos, sin, num_heads=heads),
        "eager": partial(reference, q, k, *weights, cos, sin),
        "compiled": compiled(reference, q, k, *weights, cos, sin),
        "published": published_code,
    }
    return {name: with_grads(call, [q, k, *weights]) if train else call for name, call in calls.items()}


def norm_case(size: str, dtype: str, train: bool) -> dict[str, Run]:
    batch, grid, heads, head = SIZES[size]
    width, tokens = heads * head, grid[0] * grid[1] * grid[2]
    x = torch.randn(batch, tokens, width).to(DTYPES[dtype]).requires_grad_(train)
    table = torch.randn(batch, grid[0], 6, width)  # modulation is float32 in the model
    shift, scale = (table[:, :, i].requires_grad_(train) for i in (0, 1))
    return _three_ways(modulated_norm, [x, shift, scale], train)


def gated_case(size: str, dtype: str, train: bool) -> dict[str, Run]:
    batch, grid, heads, head = SIZES[size]
    width, tokens = heads * head, grid[0] * grid[1] * grid[2]
    x, y = (torch.randn(batch, tokens, width).to(DTYPES[dtype]).requires_grad_(train) for _ in "xy")
    gate = torch.randn(batch, grid[0], 6, width)[:, :, 2].requires_grad_(train)
    return _three_ways(gated_add, [x, y, gate], train)


def _three_ways(op: Callable, inputs: list[Tensor], train: bool) -> dict[str, Run]:
    reference = partial(op, backend="reference")
    calls: dict[str, Run] = {
        "ours": partial(op, *inputs),
        "eager": partial(reference, *inputs),
        "compiled": compiled(reference, *inputs),
    }
    return {name: with_grads(call, inputs) if train else call for name, call in calls.items()}


# Tensors of x's size that an op reads and writes, forward and forward + backward.
TENSORS = {"qk_norm_rotary": (4, 10), "modulated_norm": (2, 5), "gated_add": (3, 6)}
BUILDERS = {"qk_norm_rotary": rotary_case, "modulated_norm": norm_case, "gated_add": gated_case}


def cases() -> Iterator[Case]:
    for op, build in BUILDERS.items():
        published = ("published",) if op == "qk_norm_rotary" else ()
        for size, (batch, grid, heads, head) in SIZES.items():
            shape = (batch, grid[0] * grid[1] * grid[2], heads * head)
            for dtype in TOLERANCE:
                for train in (False, True):
                    yield Case(
                        op=f"{op} {'forward + backward' if train else 'forward'}",
                        size=size,
                        dtype=dtype,
                        shape=shape,
                        build=partial(build, size, dtype, train),
                        bytes=TENSORS[op][train] * torch.Size(shape).numel() * DTYPES[dtype].itemsize,
                        tolerance=TOLERANCE[dtype],
                        baselines=("eager", "compiled", *published),
                    )


@parametrize(list(cases()))
def test_rows(benchmark: Callable, case: Case, implementation: str) -> None:
    check_and_time(benchmark, case, implementation)
