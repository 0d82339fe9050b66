"""Matrix fragments of `mma.sync`, m16n8: from registers to small matrices and back.

A warp's lane is `4 g + t`. A register holds `e` elements (4 of 8 bits, 2 of 16 bits, 1 of tf32). Register i
of A has row `g + 8 (i % 2)`, columns `4 e (i // 2) + e t ...`; register i of B has column g, rows `4 e i + e
t ...`; element i of C has row `g + 8 (i // 2)`, column `2 t + i % 2`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .dtypes import Array, bf16_to_f32, f32_to_tf32

Warps = slice | NDArray[np.int64]

_ELEMENT = {"f16": "f2", "bf16": "u2", "tf32": "f4", "s8": "i1", "u8": "u1"}


def _elements(registers: tuple[Array, ...], kind: str, warps: Warps) -> NDArray[np.float32]:
    """`[registers, warps, 8, 4, e]` in float32; 8-bit integers are exact in it, and so are their products."""
    stacked = np.stack([register.reshape(-1, 32)[warps] for register in registers])
    values = stacked.view(_ELEMENT[kind])
    if kind == "bf16":
        values = bf16_to_f32(values)
    elif kind == "tf32":
        values = f32_to_tf32(values)
    return values.astype(np.float32).reshape(len(registers), stacked.shape[1], 8, 4, -1)


def matrix_a(registers: tuple[Array, ...], kind: str, warps: Warps) -> NDArray[np.float32]:
    """`[warps, 16, k]`."""
    values = _elements(registers, kind, warps)
    count, warp_count, _, _, e = values.shape
    split = values.reshape(count // 2, 2, warp_count, 8, 4, e)  # column half, row half, warp, g, t, element
    return np.ascontiguousarray(split.transpose(2, 1, 3, 0, 4, 5)).reshape(warp_count, 16, count // 2 * 4 * e)


def matrix_b(registers: tuple[Array, ...], kind: str, warps: Warps) -> NDArray[np.float32]:
    """`[warps, k, 8]`."""
    values = _elements(registers, kind, warps)  # row block, warp, g, t, element
    count, warp_count, _, _, e = values.shape
    return np.ascontiguousarray(values.transpose(1, 0, 3, 4, 2)).reshape(warp_count, count * 4 * e, 8)


def matrix_c(registers: tuple[Array, ...], kind: str, warps: Warps, n: int) -> Array:
    """`[warps, 16, 8]` in the accumulator's type."""
    full = [np.broadcast_to(register, (n,)).reshape(-1, 32)[warps] for register in registers]
    if kind == "f16":
        halves = np.stack(full).view(np.float16)  # [row half, warp, 64]
        return halves.reshape(2, -1, 8, 8).transpose(1, 0, 2, 3).reshape(-1, 16, 8)
    values = np.stack(full, -1).reshape(-1, 8, 4, 2, 2)  # warp, g, t, row half, element
    return values.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8).view("i4" if kind == "s32" else "f4")


def multiply_add(a: NDArray[np.float32], b: NDArray[np.float32], c: Array, saturate: bool = False) -> Array:
    """a @ b + c: exact products, summed in float32 and rounded once more for float16 accumulators.

    With `saturate` integers stop at the ends of int32; else they wrap.
    """
    product = np.matmul(a, b)
    if c.dtype == np.int32 and saturate:
        return np.clip(c + product.astype(np.int64), -(2**31), 2**31 - 1).astype(np.int32)
    if c.dtype == np.int32:
        return c + product.astype(np.int32)
    if c.dtype == np.float16:
        return (product + c).astype(np.float16)
    return product + c


def put_matrix(d: Array, registers: tuple[Array, ...], warps: Warps) -> None:
    """Write `[warps, 16, 8]` to the accumulator's registers."""
    if d.dtype == np.float16:
        halves = np.ascontiguousarray(d.reshape(-1, 2, 8, 8).transpose(1, 0, 2, 3)).view(np.uint32)
        for register, half in zip(registers, halves, strict=True):
            register.reshape(-1, 32)[warps] = half.reshape(-1, 32)
        return
    values = d.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)  # row half, element, warp, g, t
    if d.dtype == np.int32:
        values = (
            values.view(np.uint32)
            if values.flags.c_contiguous
            else np.ascontiguousarray(values).view(np.uint32)
        )
    for i, register in enumerate(registers):
        register.reshape(-1, 32)[warps] = values[i // 2, i % 2].reshape(-1, 32)
