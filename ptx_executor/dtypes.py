"""PTX types as numpy types, and bfloat16 by bit tricks (numpy has none)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NUMPY: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "pred": "?", "b8": "u1", "u8": "u1", "s8": "i1",
        "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
        "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "tf32": "u4", "f16x2": "f2", "bf16x2": "u2",
        "e4m3x2": "u1",
        "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
    }.items()
}  # fmt: skip
"""numpy type of an element. The packed types, `f16x2`, `bf16x2` and `e4m3x2`, are two to a register."""

BYTES: dict[str, int] = {
    name: kind.itemsize * (2 if name.endswith("x2") else 1) for name, kind in NUMPY.items()
}
"""Bytes of a register of that type."""

UNSIGNED: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("u2"),
    4: np.dtype("u4"),
    8: np.dtype("u8"),
}
SIGNED: dict[int, np.dtype[Any]] = {
    1: np.dtype("i1"),
    2: np.dtype("i2"),
    4: np.dtype("i4"),
    8: np.dtype("i8"),
}


def is_float(name: str) -> bool:
    return "f" in name


def is_signed(name: str) -> bool:
    return name[0] == "s"


def is_half(name: str) -> bool:
    """f16, bf16 and their packed forms: computed in float32 or wider, then rounded once."""
    return name.startswith(("f16", "bf16"))


def bf16_to_f32(bits: Array) -> NDArray[np.float32]:
    """The values of bfloat16 numbers given as uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: Array) -> NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, ties to even, as uint16; NaN becomes 0x7fff as on the GPU."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def f64_to_f32_odd(values: Array) -> NDArray[np.float32]:
    """Round float64 to float32 'to odd': a second rounding to a narrower type is then the right one."""
    nearest = np.ascontiguousarray(values, np.float64).astype(np.float32)
    inexact = np.isfinite(nearest) & (nearest != values)
    bits = nearest.view(np.uint32)
    toward_zero = bits - (inexact & (np.abs(nearest) > np.abs(values)))
    return np.where(inexact, toward_zero | np.uint32(1), bits).astype(np.uint32).view(np.float32)


def f64_to_bf16(values: Array) -> NDArray[np.uint16]:
    """Round float64 to bfloat16 once, ties to even."""
    return f32_to_bf16(f64_to_f32_odd(values))


def f32_to_tf32(values: Array) -> NDArray[np.float32]:
    """Drop the 13 low mantissa bits, as a tensor core does with its tf32 operands."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def poison(array: Array) -> Array:
    """Fill an array, or a tensor, with NaN in every float type and -1 in integers, in place.

    A kernel that leaves part of its output unwritten then shows it.
    """
    if isinstance(array, np.ndarray):
        array[...] = np.frombuffer(b"\xff" * array.itemsize, array.dtype)[0]
    elif hasattr(array, "fill_"):
        array.fill_(float("nan") if array.is_floating_point() else -1)
    else:
        raise TypeError(f"poison: expected an array or a tensor, got {type(array).__name__}")
    return array
