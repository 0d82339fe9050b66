"""Run the blocks of a wave: pick warps at random, run their segments, keep their barriers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .barriers import Barriers
from .dtypes import BYTES, NUMPY, UNSIGNED, Array
from .errors import BarrierError, ExecutionTimeout
from .memory import BlockMemory, GlobalMemory
from .program import Immediate, Negated, Operand, Register
from .races import RaceDetector
from .rows import Row
from .segments import Segment, is_barrier
from .warps import LANES, ballot

if TYPE_CHECKING:
    from .kernel import Kernel
    from .report import Report

# A row whose lanes have been apart for so many steps takes any of its parts, not the earliest, every few
# steps: lanes may spin on what others have yet to do.
_PATIENCE = 32
_FAIR = 4


class Wave:
    """Some blocks of a launch, which run together.

    All blocks take the same steps as far as they agree: a step runs one segment of one warp of every block
    that is there.
    """

    def __init__(
        self,
        kernel: Kernel,
        blocks: NDArray[np.int64],
        grid: tuple[int, int, int],
        block_size: tuple[int, int, int],
        parameters: NDArray[np.uint8],
        memory: GlobalMemory,
        dynamic_shared: int,
        rng: np.random.Generator,
        report: Report,
        *,
        deadline: float,
        detect_races: bool,
        early_copies: bool,
        count_conflicts: bool,
    ) -> None:
        self.kernel, self.blocks, self.grid, self.block_size = kernel, blocks, grid, block_size
        self.parameters, self.memory, self.rng, self.report = parameters, memory, rng, report
        self.dynamic_shared, self.early_copies = dynamic_shared, early_copies
        self.count_conflicts = count_conflicts
        self._deadline = deadline
        self.threads = block_size[0] * block_size[1] * block_size[2]
        self.warps = -(-self.threads // LANES)
        size = kernel.static_shared + dynamic_shared
        self.shared = BlockMemory("shared", len(blocks), size)
        self.local = BlockMemory("local", len(blocks) * self.warps * LANES, kernel.local_bytes)
        self.races = None
        if detect_races and size and self.warps > 1:
            cell, atomics = kernel.shared_cell
            self.races = RaceDetector(self.warps, len(blocks), self.shared.stride, cell, atomics)
        self.barriers = Barriers(self)
        self.rows = [Row(self, index) for index in range(self.warps)]
        self._end = len(kernel.segments)
        for row in self.rows:
            row.pc[~row.alive] = self._end
        self._storage = self._registers()
        self._awake: set[Row] = set()

    def _registers(self) -> dict[Register, Array]:
        """`[rows, lanes]` for every register: NaN in floats, nonsense in integers, chance in predicates."""
        n = len(self.blocks) * LANES
        storage: dict[Register, Array] = {}
        for size in (1, 2, 4, 8):
            registers = [register for register in self.kernel.registers if BYTES[register.type] == size]
            if size == 1:
                values = self.rng.integers(0, 2, (len(registers), len(self.rows), n), np.uint8)
            else:
                values = np.full(
                    (len(registers), len(self.rows), n), 0xFF * (256**size // 255), UNSIGNED[size]
                )
            storage |= {register: values[i] for i, register in enumerate(registers)}
        return storage

    def register(self, row: Row, operand: Operand) -> Array:
        """The values of a register, in its declared type: a view."""
        assert isinstance(operand, Register)
        return self._storage[operand][row.index].view(NUMPY[operand.type])

    def run(self) -> None:
        """Run all blocks to their end.

        Raises:
            BarrierError: when threads wait that nobody can free.
            ExecutionTimeout: when the time is up.
        """
        self._awake = set(self.rows)
        while self._awake:
            rows = [row for row in self.rows if row in self._awake]
            row = rows[self.rng.integers(len(rows))]
            # A warp may get far ahead of the others, or stop soon: both happen.
            budget = int(self.rng.geometric(0.3)) if self.rng.random() < 0.5 else 1 << 30
            while budget:
                if not self._step(row):
                    self._awake.discard(row)
                    break
                budget -= 1
                if time.perf_counter() > self._deadline:
                    raise ExecutionTimeout(f"out of time in {self.kernel.where(int(row.pc.min()))}")
        if any(row.alive.any() for row in self.rows):
            self._deadlock()

    def wake(self) -> None:
        """A barrier has let threads go: rows that could not run may be able to."""
        self._awake = set(self.rows)

    def _deadlock(self) -> None:
        parts = [self.barriers.stuck()]
        for row in self.rows:
            stuck = row.alive & ~row.waiting
            if stuck.any():
                pc = int(row.pc[stuck].min())
                parts.append(f"a part of warp {row.index} for its other lanes in {self.kernel.where(pc)}")
        ended = sum(int((~row.alive & (row.thread < self.threads)).sum()) for row in self.rows)
        tail = f"; {ended} threads have ended" if ended else ""
        raise BarrierError(f"deadlock, waiting: {', '.join(part for part in parts if part)}{tail}")

    # One step.

    def _choose(self, row: Row) -> tuple[int, NDArray[np.bool_]] | None:
        """The segment that a row runs next and the lanes that do; `None` if none can."""
        ready = row.alive & ~row.waiting
        pcs = row.pc[ready]
        if not pcs.size:
            return None
        first = int(pcs.min())
        if first == int(pcs.max()):
            candidates = [first]
            row.apart //= 2
        else:
            candidates = [int(pc) for pc in np.unique(pcs)]
            row.apart += 1
            if row.apart > _PATIENCE and row.apart % _FAIR == 0:
                self.rng.shuffle(candidates)
        for pc in candidates:
            mask = ready & (row.pc == pc)
            members = self.kernel.segments[pc].members
            if members is not None and not mask.all():
                mask = self._gathered(row, mask, members)
            if mask.any():
                return pc, mask
        return None

    def _gathered(self, row: Row, mask: NDArray[np.bool_], members: Register | int) -> NDArray[np.bool_]:
        """The lanes all of whose partners are here."""
        wanted = np.uint32(0xFFFFFFFF) if isinstance(members, int) else self.register(row, members)
        missing = ballot(row.alive) & ~ballot(mask) & wanted
        return mask & (missing == 0)

    def _step(self, row: Row) -> bool:
        chosen = self._choose(row)
        if chosen is None:
            return False
        pc, mask = chosen
        segment = self.kernel.segments[pc]
        everyone = bool(mask.all())
        warps = int(mask.reshape(-1, LANES).any(1).sum())
        self.report.instructions += warps * (len(segment.body) + (segment.end is not None))
        if segment.body:
            run = self.kernel.compiled(pc, masked=not everyone)
            run(self._views(row), row, mask)
        self._leave(row, segment, mask)
        return True

    def _views(self, row: Row) -> list[Array]:
        """The row's views, with those that segments compiled since have asked for."""
        wanted = self.kernel.layout.views
        if len(row.views) < len(wanted):
            for register, kind in list(wanted)[len(row.views) :]:
                row.views.append(self._storage[register][row.index].view(kind))
        return row.views

    # The end of a segment.

    def _leave(self, row: Row, segment: Segment, mask: NDArray[np.bool_]) -> None:
        end = segment.end
        row.pc[mask] = segment.next
        if end is not None:
            taken = mask
            if end.guard is not None:
                register, negated = end.guard
                taken = mask & (self.register(row, register) != negated)
            if end.opcode == "bra":
                row.pc[taken] = segment.targets[0]
            elif end.opcode == "brx":
                self._jump_by_index(row, segment, taken)
            elif is_barrier(end):
                self._barrier(row, segment, taken)
            else:
                row.pc[taken] = self._end
        row.alive &= row.pc != self._end

    def _jump_by_index(self, row: Row, segment: Segment, taken: NDArray[np.bool_]) -> None:
        assert segment.end is not None
        index = self.register(row, segment.end.operands[0])[taken]
        if (index >= len(segment.targets)).any():
            raise BarrierError(f"line {segment.end.line}: brx.idx past its {len(segment.targets)} targets")
        row.pc[taken] = np.array(segment.targets)[index]

    def _barrier(self, row: Row, segment: Segment, taken: NDArray[np.bool_]) -> None:
        end = segment.end
        assert end is not None
        if not taken.any():
            return
        row.whole_warps(taken | ~row.alive, end.line)
        operands = list(end.operands)
        votes = None
        if "red" in end.mods:
            predicate = operands.pop()
            operands = operands[1:]
            negated = isinstance(predicate, Negated)
            register = predicate.register if isinstance(predicate, Negated) else predicate
            votes = (self.register(row, register) != negated)[taken]
        number = self._uniform(row, operands[0], taken, end.line)
        threads = self._uniform(row, operands[1], taken, end.line) if len(operands) > 1 else None
        self.barriers.arrive(row, taken, end, number, threads, votes)

    def _uniform(self, row: Row, operand: Operand, mask: NDArray[np.bool_], line: int) -> int:
        if isinstance(operand, Immediate):
            return operand.value
        values = np.unique(self.register(row, operand)[mask])
        if values.size != 1:
            raise BarrierError(
                f"line {line}: barrier number or count differs between warps that run together"
            )
        return int(values[0])
