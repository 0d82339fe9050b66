"""Small Triton kernels, compiled ahead of time for cuda:80."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Compiled(NamedTuple):
    """PTX with what a launch has to know: dynamic shared memory in bytes and threads of a block."""

    ptx: str
    shared: int
    threads: int


@triton.jit
def softmax(x, y, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * columns + at, mask=at < columns, other=float("-inf")).to(tl.float32)
    values = tl.exp(values - tl.max(values, 0))
    tl.store(y + row * columns + at, values / tl.sum(values, 0), mask=at < columns)


@triton.jit
def matmul(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, k, BK):
        depth = k0 + tl.arange(0, BK)
        left = tl.load(
            a + rows[:, None] * k + depth[None, :], mask=(rows[:, None] < m) & (depth[None, :] < k), other=0.0
        )
        right = tl.load(
            b + depth[:, None] * n + columns[None, :],
            mask=(depth[:, None] < k) & (columns[None, :] < n),
            other=0.0,
        )
        total = tl.dot(left, right, total)
    tl.store(
        c + rows[:, None] * n + columns[None, :], total, mask=(rows[:, None] < m) & (columns[None, :] < n)
    )


@triton.jit
def attention(q, k, v, o, length, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows, channels = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    queries = tl.load(q + rows[:, None] * D + channels[None, :], mask=rows[:, None] < length, other=0.0)
    highest, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, D), tl.float32)
    for start in range(0, tl.minimum(tl.program_id(0) * BM + BM, length), BN):
        columns = start + tl.arange(0, BN)
        keys = tl.load(
            k + columns[None, :] * D + channels[:, None], mask=columns[None, :] < length, other=0.0
        )
        values = tl.load(
            v + columns[:, None] * D + channels[None, :], mask=columns[:, None] < length, other=0.0
        )
        visible = (columns[None, :] <= rows[:, None]) & (columns[None, :] < length)
        score = tl.where(visible, tl.dot(queries, keys) * scale, float("-inf"))
        above = tl.maximum(highest, tl.max(score, 1))
        shrink, p = tl.exp2(highest - above), tl.exp2(score - above[:, None])
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(values.dtype), values, out * shrink[:, None])
        highest = above
    tl.store(o + rows[:, None] * D + channels[None, :], out / total[:, None], mask=rows[:, None] < length)


@triton.jit
def column_norms(x, sums, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    """Two-dimensional tiles, half precision in, atomics out, a transposed reduction."""
    at = tl.program_id(1) * BC + tl.arange(0, BC)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    mask = (row[:, None] < rows) & (at[None, :] < columns)
    values = tl.load(x + row[:, None] * columns + at[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(sums + at, tl.sum(values * values, 0), mask=at < columns)


KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, int], int, int]] = {
    # name: kernel, types of its arguments, constants, warps, stages
    "softmax": (softmax, {"x": "*fp16", "y": "*fp32", "columns": "i32"}, {"BLOCK": 512}, 4, 1),
    "matmul_bf16": (
        matmul,
        {"a": "*bf16", "b": "*bf16", "c": "*fp32", "m": "i32", "n": "i32", "k": "i32"},
        {"BM": 64, "BN": 64, "BK": 32},
        4,
        3,
    ),
    "matmul_tf32": (
        matmul,
        {"a": "*fp32", "b": "*fp32", "c": "*fp32", "m": "i32", "n": "i32", "k": "i32"},
        {"BM": 32, "BN": 32, "BK": 32},
        2,
        2,
    ),
    "attention": (
        attention,
        {"q": "*bf16", "k": "*bf16", "v": "*bf16", "o": "*fp32", "length": "i32", "scale": "fp32"},
        {"D": 32, "BM": 64, "BN": 32},
        4,
        2,
    ),
    "column_norms": (
        column_norms,
        {"x": "*fp16", "sums": "*fp32", "rows": "i32", "columns": "i32"},
        {"BR": 32, "BC": 64},
        4,
        1,
    ),
}


def compile_kernel(name: str) -> Compiled:
    """Compile one of `KERNELS`; pointers and sizes are promised to be multiples of 16."""
    kernel, types, constants, warps, stages = KERNELS[name]
    signature = types | dict.fromkeys(constants, "constexpr")
    pointers = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")
    }
    sizes = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(types) if arg in ("n", "k", "columns")}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=pointers | sizes)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    return Compiled(compiled.asm["ptx"], compiled.metadata.shared, 32 * warps)
