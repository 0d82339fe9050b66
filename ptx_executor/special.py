"""Special registers: who and where a thread is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .dtypes import Array
from .warps import LANES

if TYPE_CHECKING:
    from .rows import Row

_MULTIPROCESSORS = 108  # of an A100, the largest sm_80
_CLOCKS = ("clock", "clock_hi", "clock64", "globaltimer")
_GRID = tuple(f"{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz")
_WARP = (
    "laneid",
    "warpid",
    "nwarpid",
    "lanemask_eq",
    "lanemask_lt",
    "lanemask_le",
    "lanemask_gt",
    "lanemask_ge",
)
_LAUNCH = ("smid", "nsmid", "gridid", "dynamic_smem_size", "total_smem_size")

NAMES = frozenset((*_CLOCKS, *_GRID, *_WARP, *_LAUNCH))
"""The special registers that can be read, without the per cent sign."""


def coordinates(linear: Array, size: tuple[int, int, int]) -> tuple[Array, Array, Array]:
    """x, y, z of linear indices."""
    return linear % size[0], linear // size[0] % size[1], linear // (size[0] * size[1])


def read(row: Row, name: str) -> Array:
    """The values of one of `NAMES` in the lanes of a row, `[n]`; clocks count instructions."""
    wave = row.wave
    if name in _CLOCKS:
        return np.full(row.n, wave.report.instructions if name != "clock_hi" else 0, np.uint64)
    base, _, axis = name.partition(".")
    if axis:
        i = "xyz".index(axis)
        if base == "tid":
            return coordinates(row.thread, wave.block_size)[i]
        if base == "ctaid":
            return coordinates(wave.blocks[row.block], wave.grid)[i]
        return np.full(row.n, {"ntid": wave.block_size, "nctaid": wave.grid}[base][i])
    if name.startswith("lanemask"):
        bit = np.uint32(1) << (row.thread % LANES).astype(np.uint32)
        below = bit - np.uint32(1)
        return {"eq": bit, "lt": below, "le": below | bit, "gt": ~(below | bit), "ge": ~below}[name[-2:]]
    if name == "laneid":
        return row.thread % LANES
    if name == "warpid":
        return row.thread // LANES
    if name == "smid":
        return wave.blocks[row.block] % _MULTIPROCESSORS
    everywhere = {
        "nwarpid": wave.warps,
        "nsmid": _MULTIPROCESSORS,
        "gridid": 0,
        "dynamic_smem_size": wave.dynamic_shared,
        "total_smem_size": wave.shared.size,
    }
    return np.full(row.n, everywhere[name])
