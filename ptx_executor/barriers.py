"""Barriers of a block: who has arrived, and who is let go."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import BarrierError
from .warps import LANES

if TYPE_CHECKING:
    from .program import Instruction
    from .rows import Row
    from .wave import Wave

_COUNT = 16


class _Waiter(NamedTuple):
    row: Row
    lanes: NDArray[np.int64]
    instruction: Instruction
    votes: NDArray[np.bool_] | None  # of bar.red, for those lanes


class Barriers:
    """The 16 barriers of each block of a wave. A warp counts as 32 threads, as on the GPU."""

    def __init__(self, wave: Wave) -> None:
        self._wave = wave
        blocks = len(wave.blocks)
        self._expected = np.zeros((_COUNT, blocks), np.int64)
        self._arrived = np.zeros((_COUNT, blocks, wave.warps), bool)
        self._waiting = np.zeros((_COUNT, blocks, wave.warps), bool)
        self._line = np.zeros((_COUNT, blocks), np.int64)
        self._waiters: list[_Waiter] = []

    def arrive(
        self,
        row: Row,
        mask: NDArray[np.bool_],
        instruction: Instruction,
        number: int,
        threads: int | None,
        votes: NDArray[np.bool_] | None,
    ) -> None:
        """The warps of `mask` come to a barrier for `threads` threads; `None` is the whole block.

        Raises:
            BarrierError: if the warps of a block come to a barrier of the whole block at different
                instructions, or with different counts, or one of them comes twice.
        """
        if not 0 <= number < _COUNT:
            raise BarrierError(f"line {instruction.line}: barrier {number} of {_COUNT}")
        blocks = np.flatnonzero(mask.reshape(-1, LANES).any(1))
        whole = self._wave.warps * LANES
        count = whole if threads is None else threads
        if count % LANES or not 0 < count <= whole:
            raise BarrierError(
                f"line {instruction.line}: a barrier for {count} threads; "
                f"expected a multiple of {LANES} up to {whole}"
            )
        started = self._arrived[number, blocks].any(1)
        known, line = self._expected[number, blocks][started], self._line[number, blocks][started]
        if (known != count).any():
            raise BarrierError(
                f"line {instruction.line}: barrier {number} waits for {count} threads, "
                f"but for {int(known[0])} at line {int(line[0])}"
            )
        if threads is None and (line != instruction.line).any():
            other = int(line[line != instruction.line][0])
            raise BarrierError(
                f"divergent barrier {number}: warps of one block wait for the whole block at lines "
                f"{other} and {instruction.line}"
            )
        if self._arrived[number, blocks, row.index].any():
            raise BarrierError(f"line {instruction.line}: warp {row.index} comes to barrier {number} twice")
        self._expected[number, blocks] = count
        self._line[number, blocks] = instruction.line
        self._arrived[number, blocks, row.index] = True
        if "arrive" not in instruction.mods:
            self._waiting[number, blocks, row.index] = True
            lanes = np.flatnonzero(mask)
            row.waiting[lanes] = True
            self._waiters.append(_Waiter(row, lanes, instruction, votes))
        full = self._arrived[number, blocks].sum(1) * LANES >= count
        if full.any():
            self._release(number, blocks[full])

    def _release(self, number: int, blocks: NDArray[np.int64]) -> None:
        wave = self._wave
        wave.report.barriers += blocks.size
        if wave.races is not None:
            wave.races.barrier(self._arrived[number, blocks].T, self._waiting[number, blocks].T, blocks)
        freed = np.zeros((len(wave.blocks), wave.warps), bool)
        freed[blocks] = self._waiting[number, blocks]
        released: list[_Waiter] = []
        left: list[_Waiter] = []
        for waiter in self._waiters:
            go = freed[waiter.row.block[waiter.lanes], waiter.row.index]
            for chosen, into in ((go, released), (~go, left)):
                if chosen.any():
                    votes = None if waiter.votes is None else waiter.votes[chosen]
                    into.append(waiter._replace(lanes=waiter.lanes[chosen], votes=votes))
        self._waiters = left
        if any(waiter.votes is not None for waiter in released):
            self._count_votes(released)
        for waiter in released:
            waiter.row.waiting[waiter.lanes] = False
        self._arrived[number, blocks] = self._waiting[number, blocks] = False
        wave.wake()

    def _count_votes(self, released: list[_Waiter]) -> None:
        """`bar.red`: how many threads of the block voted for it, and of how many, handed to each of them."""
        blocks = len(self._wave.blocks)
        yes, all_ = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
        for waiter in released:
            block = waiter.row.block[waiter.lanes]
            np.add.at(all_, block, 1)
            if waiter.votes is not None:
                np.add.at(yes, block, waiter.votes)
        for waiter in released:
            block = waiter.row.block[waiter.lanes]
            mods = waiter.instruction.mods
            result = yes if "popc" in mods else yes == all_ if "and" in mods else yes > 0
            self._wave.register(waiter.row, waiter.instruction.operands[0])[waiter.lanes] = result[block]

    def stuck(self) -> str:
        """For messages: who waits where."""
        seen = set()
        for waiter in self._waiters:
            block = int(self._wave.blocks[waiter.row.block[waiter.lanes[0]]])
            seen.add(f"warp {waiter.row.index} of block {block} at line {waiter.instruction.line}")
        names = sorted(seen)
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
