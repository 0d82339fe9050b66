"""Asynchronous copies from global to shared memory: `cp.async`, its groups and its waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dtypes import Array
from .errors import MemoryAccessError

if TYPE_CHECKING:
    from .memory import Offsets
    from .rows import Lanes, Row


class _Copy(NamedTuple):
    """One instruction's copies for some lanes: `used` of `size` bytes are read, the rest is zero."""

    lanes: NDArray[np.int64]
    group: NDArray[np.int64]
    destination: Offsets
    source: Offsets
    used: NDArray[np.int64]
    size: int

    def of(self, chosen: NDArray[np.bool_]) -> _Copy:
        lanes, group, destination, source, used, size = self
        return _Copy(lanes[chosen], group[chosen], destination[chosen], source[chosen], used[chosen], size)


class AsyncCopies:
    """The copies of a row of warps that are on their way.

    They are checked when they start and move their data when they are waited for: a kernel that reads too
    early finds what was there before. With `early_copies` they may move it at a random time before, too.
    """

    def __init__(self, row: Row) -> None:
        self._row = row
        self._flying: list[_Copy] = []
        self._committed = np.zeros(row.n, np.int64)

    def start(
        self, destination: Array, source: Array, lanes: Lanes, size: int, used: Array | None, line: int
    ) -> None:
        """`cp.async [destination], [source], size, used`.

        Raises:
            MemoryAccessError: if an address is out of bounds or not a multiple of `size`. A source of which
                nothing is used may be anything.
        """
        row = self._row
        wave = row.wave
        lanes = np.arange(row.n) if lanes is None else lanes
        amounts = np.full(lanes.size, size) if used is None else row.pick(used, lanes).astype(np.int64)
        if amounts.max(initial=0) > size:
            raise MemoryAccessError(f"cp.async of {int(amounts.max())} bytes with a size of {size}")
        to = row.shared_offsets(row.pick(destination, lanes), lanes, size, "write", line, pending=True)
        address = row.pick(source, lanes)
        skewed = np.flatnonzero((address & np.uint64(size - 1) != 0) & (amounts > 0))
        if skewed.size:
            thread = row.place(lanes)(int(skewed[0]))
            raise MemoryAccessError(f"{thread}: the source of cp.async is not a multiple of {size}")
        at = np.zeros(lanes.size, np.int64)
        for amount in np.unique(amounts[amounts > 0]):
            some = np.flatnonzero(amounts == amount)
            at[some] = wave.memory.spans(address[some], int(amount), row.place(lanes[some]))
        wave.report.global_load_bytes += int(amounts.sum())
        self._flying.append(_Copy(lanes, self._committed[lanes], to, at, amounts, size))
        if wave.early_copies and wave.rng.random() < 0.5:
            for copy in self._flying:
                self._move(copy.of(wave.rng.random(copy.lanes.size) < 0.5))

    def commit(self, lanes: Lanes) -> None:
        """`cp.async.commit_group`."""
        self._committed[slice(None) if lanes is None else lanes] += 1

    def wait(self, lanes: Lanes, pending: int | None) -> None:
        """`cp.async.wait_group pending`; `None` waits for all, those of no group too."""
        here = np.zeros(self._row.n, bool)
        here[slice(None) if lanes is None else lanes] = True
        if pending is None:
            self._land(lambda copy: here[copy.lanes])
        else:
            self._land(lambda copy: here[copy.lanes] & (copy.group < self._committed[copy.lanes] - pending))

    def _land(self, which: Callable[[_Copy], NDArray[np.bool_]]) -> None:
        """Complete the copies that `which` picks."""
        row, races = self._row, self._row.wave.races
        left = []
        for copy in self._flying:
            now = which(copy)
            if now.any():
                landing = copy.of(now)
                self._move(landing)
                if races is not None:
                    races.landed(row.index, row.block[landing.lanes], landing.destination, copy.size)
            if not now.all():
                left.append(copy.of(~now))
        self._flying = left

    def _move(self, copy: _Copy) -> None:
        wave = self._row.wave
        data = wave.memory.read(copy.source, 1, copy.size)
        data[np.arange(copy.size) >= copy.used[:, None]] = 0
        wave.shared.write(copy.destination, data, 1, copy.size)
