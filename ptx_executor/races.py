"""Race detection in shared memory, by vector clocks over the warps of a block.

A warp's clock goes up at every barrier it takes part in, and a barrier hands each warp what the others know.
Every cell of shared memory remembers, for each warp, the clock of its last read and write; an access is a
race if a conflicting one carries a clock that the accessing warp has not been told of. Lanes of one warp are
not told apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import RaceError

_LINE_BITS = 24
_PENDING = np.int64(1 << 60)  # an asynchronous copy that has not landed: later than any clock
_CONFLICTS = {"read": ("write", "atomic"), "write": ("read", "write", "atomic"), "atomic": ("read", "write")}
_VERB = {"read": "reads", "write": "writes", "atomic": "updates"}

Ints = NDArray[np.int64]


class RaceDetector:
    """Clocks and cells of the blocks that run together.

    Args:
        warps: warps of a block.
        blocks: blocks that run together.
        stride: bytes of shared memory of a block.
        cell: bytes of a cell: the narrowest access of the kernel.
        atomics: whether the kernel has atomics on shared memory.
    """

    def __init__(self, warps: int, blocks: int, stride: int, cell: int, atomics: bool) -> None:
        self._cell, self._stride = cell, stride
        # clock[w, b, u]: how far warp w of block b knows of warp u
        self._clock = np.zeros((warps, blocks, warps), np.int64)
        self._clock[np.arange(warps), :, np.arange(warps)] = 1
        kinds = ("read", "write", "atomic") if atomics else ("read", "write")
        # stamp[kind][cell, u]: clock of warp u's last access, and below it the line of the PTX
        self._stamp = {kind: np.zeros((blocks * stride // cell, warps), np.int64) for kind in kinds}

    def access(
        self,
        kind: str,
        warp: int,
        blocks: Ints,
        offsets: Ints,
        size: int,
        line: int,
        *,
        pending: bool = False,
        same: NDArray[np.bool_] | None = None,
    ) -> None:
        """Check and note an access of `size` bytes at arena `offsets [n]` by `warp` in `blocks [n]`.

        `pending` marks the start of an asynchronous copy; `landed` has to follow. `same [n]` says where a
        write leaves
        memory as it is: two warps that write one value do not race (compilers let warps do the same work
            twice).

        Raises:
            RaceError: naming both lines and warps.
        """
        cells = (offsets // self._cell)[:, None] + np.arange(size // self._cell)
        known = (self._clock[warp, blocks] + 1) << _LINE_BITS  # [n, warps]: first stamp that is not known
        for other in _CONFLICTS[kind]:
            stamps = self._stamp.get(other)
            if stamps is None:
                continue
            found = stamps[cells]
            late = found >= known[:, None]
            if late.any() and other == "write" and same is not None:
                late &= ~same[:, None, None] | (found >= _PENDING)
            if late.any():
                self._report(kind, warp, offsets, cells, line, other, late)
        if pending:
            self._stamp[kind][cells, warp] = _PENDING | line
        else:
            own = (self._clock[warp, blocks, warp] << _LINE_BITS) | line
            self._stamp[kind][cells, warp] = own[:, None]

    def landed(self, warp: int, blocks: Ints, offsets: Ints, size: int) -> None:
        """An asynchronous copy of `warp` is complete, seen from its own threads."""
        cells = (offsets // self._cell)[:, None] + np.arange(size // self._cell)
        lines = self._stamp["write"][cells, warp] & ((1 << _LINE_BITS) - 1)
        self._stamp["write"][cells, warp] = (self._clock[warp, blocks, warp] << _LINE_BITS)[:, None] | lines

    def barrier(self, arrived: NDArray[np.bool_], waiting: NDArray[np.bool_], blocks: Ints) -> None:
        """A barrier completes in `blocks [n]`: `arrived [warps, n]` took part, `waiting` of them waited."""
        clock = self._clock[:, blocks]  # [warps, n, warps]
        merged = np.where(arrived[:, :, None], clock, 0).max(0)
        clock = np.where(waiting[:, :, None], np.maximum(clock, merged), clock)
        own = np.arange(clock.shape[0])
        clock[own, :, own] += arrived
        self._clock[:, blocks] = clock

    def _report(
        self, kind: str, warp: int, offsets: Ints, cells: Ints, line: int, other: str, late: NDArray[np.bool_]
    ) -> None:
        lane, at, rival = (int(i) for i in np.argwhere(late)[0])
        stamp = int(self._stamp[other][cells[lane, at], rival])
        rival_line = stamp & ((1 << _LINE_BITS) - 1)
        address = int(offsets[lane]) % self._stride
        if stamp >= int(_PENDING):
            how = f"an asynchronous copy of warp {rival} (line {rival_line}) to it has not been waited for"
        else:
            how = f"warp {rival} {_VERB[other]} it at line {rival_line} with no barrier between the two"
        raise RaceError(f"warp {warp} {_VERB[kind]} shared address {address:#x} at line {line}, but {how}")
