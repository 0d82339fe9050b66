"""A row of warps: the same warp of every block that runs, executed together, and its accesses to memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import special
from .atomics import update
from .banks import bank_conflicts
from .copies import AsyncCopies
from .dtypes import NUMPY, UNSIGNED, Array
from .errors import BarrierError, DeviceAssertion, MemoryAccessError
from .memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_BITS, Place
from .warps import LANES, spread

if TYPE_CHECKING:
    from .memory import Offsets
    from .wave import Wave

Lanes = NDArray[np.int64] | None
_WINDOWS = {SHARED_WINDOW >> WINDOW_BITS: "shared", LOCAL_WINDOW >> WINDOW_BITS: "local"}
_WINDOWS[PARAM_WINDOW >> WINDOW_BITS] = "param"


class Row:
    """Warp `index` of all blocks of a wave; lane arrays are `[n]`, 32 lanes for each block.

    Attributes:
        pc: the segment each lane is in.
        alive: lanes that have not ended.
        waiting: lanes that wait at a barrier.
        apart: for how many steps its lanes have been at different places, about.
        views: the register views that compiled segments use.
    """

    def __init__(self, wave: Wave, index: int) -> None:
        self.wave, self.index = wave, index
        blocks = len(wave.blocks)
        self.n = blocks * LANES
        self.block = np.repeat(np.arange(blocks), LANES)
        self.thread = np.tile(np.arange(LANES) + index * LANES, blocks)  # linear index within the block
        threads = wave.threads
        self.alive = self.thread < threads
        self.pc = np.zeros(self.n, np.int64)
        self.waiting = np.zeros(self.n, bool)
        self.apart = 0
        self.owner = self.block * wave.warps * LANES + self.thread  # of local memory
        self.views: list[Array] = []
        self._specials: dict[str, NDArray[np.uint32]] = {}
        self.copies = AsyncCopies(self)

    # Who and where.

    def special(self, name: str) -> Array:
        """A special register, `[n]`; all but the clocks stay as they are."""
        if "clock" in name or name == "globaltimer":
            return special.read(self, name)
        if name not in self._specials:
            self._specials[name] = special.read(self, name).astype(np.uint32)
        return self._specials[name]

    def place(self, lanes: Lanes) -> Place:
        """For messages: which thread of which block an element of an access belongs to."""

        def name(at: int) -> str:
            lane = int(lanes[at % lanes.size]) if lanes is not None else at % self.n
            block = [int(v) for v in special.coordinates(self.wave.blocks[self.block[lane]], self.wave.grid)]
            thread = [int(v) for v in special.coordinates(self.thread[lane], self.wave.block_size)]
            return f"block {tuple(block)}, thread {tuple(thread)}"

        return name

    def pick(self, values: Array, lanes: Lanes) -> Array:
        """Values of the lanes that take part; `values` is `[n]`, or `[1]` for all."""
        full = spread(values, self.n)
        return full if lanes is None else full[lanes]

    def whole_warps(self, mask: NDArray[np.bool_], line: int) -> NDArray[np.int64]:
        """The warps of a mask, all of whose lanes have to be in it."""
        by_warp = mask.reshape(-1, LANES)
        some = by_warp.any(1)
        if (some != by_warp.all(1)).any():
            raise BarrierError(f"line {line}: an aligned instruction is executed by a part of a warp")
        return np.flatnonzero(some)

    def trap(self, lanes: Lanes, what: str) -> None:
        if lanes is None or lanes.size:
            raise DeviceAssertion(f"{self.place(lanes)(0)}: {what}")

    # Loads and stores.

    def _space_of(self, address: Array) -> list[tuple[str, NDArray[np.bool_]]]:
        """Generic addresses by space; the window is taken off with `_within`."""
        window = (address >> np.uint64(WINDOW_BITS)).astype(np.int64)
        return [(_WINDOWS.get(int(each), "global"), window == each) for each in np.unique(window)]

    @staticmethod
    def _within(address: Array, space: str) -> Array:
        return address if space == "global" else address & np.uint64((1 << WINDOW_BITS) - 1)

    def load(
        self,
        space: str,
        address: Array,
        lanes: Lanes,
        element: int,
        count: int,
        line: int,
        unchanging: bool = False,
    ) -> Array:
        """`[n, count]` unsigned elements of the lanes that take part.

        `unchanging` (`.nc`): the launch must not store to this memory.
        """
        if space == "param" and address.size == 1:
            offset = int(address[0])
            return self.wave.parameters[offset : offset + element * count].view(UNSIGNED[element])[None]
        address = self.pick(address, lanes)
        if unchanging:
            self.wave.memory.note_unchanging(address, element * count, self.place(lanes))
        if space != "generic":
            return self._load(space, address, lanes, element, count, line)
        result = np.empty((address.size, count), UNSIGNED[element])
        everyone = np.arange(self.n) if lanes is None else lanes
        for name, chosen in self._space_of(address):
            inner = self._within(address[chosen], name)
            result[chosen] = self._load(name, inner, everyone[chosen], element, count, line)
        return result

    def _load(self, space: str, address: Array, lanes: Lanes, element: int, count: int, line: int) -> Array:
        size, wave = element * count, self.wave
        if space == "global":
            wave.report.global_load_bytes += size * address.size
            return wave.memory.read(wave.memory.offsets(address, size, self.place(lanes)), element, count)
        if space == "shared":
            return wave.shared.read(self.shared_offsets(address, lanes, size, "read", line), element, count)
        if space == "local":
            owner = self.owner if lanes is None else self.owner[lanes]
            return wave.local.read(
                wave.local.offsets(address, owner, size, self.place(lanes)), element, count
            )
        if int(address.max(initial=0)) + size > wave.parameters.size:
            raise MemoryAccessError(f"line {line}: a load past the end of the kernel's parameters")
        at = address.astype(np.int64)[:, None] + np.arange(size)
        return wave.parameters[at].view(UNSIGNED[element])

    def shared_offsets(
        self,
        address: Array,
        lanes: Lanes,
        size: int,
        kind: str,
        line: int,
        pending: bool = False,
        data: Array | None = None,
    ) -> Offsets:
        """Checked offsets into shared memory, noted for the detection of races; `data` is what a store
        writes.
        """
        wave = self.wave
        block = self.block if lanes is None else self.block[lanes]
        offsets = wave.shared.offsets(address, block, size, self.place(lanes))
        if kind == "read":
            wave.report.shared_load_bytes += size * address.size
        else:
            wave.report.shared_store_bytes += size * address.size
        if wave.count_conflicts:
            wave.report.bank_conflicts += bank_conflicts(
                address, np.arange(self.n) if lanes is None else lanes, size
            )
        if wave.races is not None and address.size:
            same = None
            if data is not None:
                same = (wave.shared.read(offsets, data.itemsize, data.shape[1]) == data).all(1)
            wave.races.access(kind, self.index, block, offsets, size, line, pending=pending, same=same)
        return offsets

    def store(
        self, space: str, address: Array, lanes: Lanes, values: list[Array], element: int, line: int
    ) -> None:
        address = self.pick(address, lanes)
        kind = UNSIGNED[element]
        data = np.stack([self.pick(value.view(kind), lanes) for value in values], -1)
        if space != "generic":
            return self._store(space, address, lanes, data, element, line)
        everyone = np.arange(self.n) if lanes is None else lanes
        for name, chosen in self._space_of(address):
            self._store(
                name, self._within(address[chosen], name), everyone[chosen], data[chosen], element, line
            )
        return None

    def _store(self, space: str, address: Array, lanes: Lanes, data: Array, element: int, line: int) -> None:
        count = data.shape[1]
        size, wave = element * count, self.wave
        if space == "global":
            wave.report.global_store_bytes += size * address.size
            wave.memory.write(
                wave.memory.offsets(address, size, self.place(lanes), store=True), data, element, count
            )
        elif space == "shared":
            offsets = self.shared_offsets(address, lanes, size, "write", line, data=data)
            wave.shared.write(offsets, data, element, count)
        elif space == "local":
            owner = self.owner if lanes is None else self.owner[lanes]
            wave.local.write(
                wave.local.offsets(address, owner, size, self.place(lanes)), data, element, count
            )
        else:
            raise MemoryAccessError(f"line {line}: a store to the kernel's parameters")

    def atomic(
        self,
        space: str,
        action: str,
        kind: str,
        address: Array,
        lanes: Lanes,
        values: list[Array],
        wants: bool,
        line: int,
    ) -> Array:
        """`atom` and `red`: lanes come in random order. Returns the old values, unsigned, if `wants`."""
        wave = self.wave
        address = self.pick(address, lanes)
        element = NUMPY[kind].itemsize * (2 if kind.endswith("x2") else 1)
        data = [self.pick(value.view(UNSIGNED[element]), lanes) for value in values]
        old = np.zeros(address.size, UNSIGNED[element])
        everyone = np.arange(self.n) if lanes is None else lanes
        spaces = self._space_of(address) if space == "generic" else [(space, np.ones(address.size, bool))]
        for name, chosen in spaces:
            inner, who = (
                self._within(address[chosen], name) if space == "generic" else address[chosen],
                everyone[chosen],
            )
            if name == "shared":
                offsets, arena = self.shared_offsets(inner, who, element, "atomic", line), wave.shared
            elif name == "global":
                offsets = wave.memory.offsets(inner, element, self.place(who), store=True)
                arena = wave.memory  # type: ignore[assignment]
                wave.report.atomics += inner.size
            else:
                raise MemoryAccessError(f"line {line}: an atomic on {name} memory")
            cells = arena.rows(element, element)[:, 0]
            old[chosen] = update(
                cells, offsets // element, action, kind, [d[chosen] for d in data], wave.rng, wants
            )
        return old

    # Matrices.

    def load_matrix(
        self, address: Array, warps: slice | Array, count: int, transposed: bool, line: int
    ) -> list[Array]:
        """`ldmatrix`: `count` registers `[n]`. Lanes 8 j to 8 j + 7 hold the addresses of the rows of matrix
        j.
        """
        offsets = self._matrix_rows(address, warps, count, "read", line)
        rows = self.wave.shared.read(offsets.ravel(), 2, 8).reshape(-1, count, 8, 8)
        if transposed:
            rows = rows.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(rows.transpose(1, 0, 2, 3)).view(np.uint32)
        return list(words.reshape(count, -1))

    def store_matrix(
        self, address: Array, warps: slice | Array, values: tuple[Array, ...], transposed: bool, line: int
    ) -> None:
        """`stmatrix`, the other way round."""
        offsets = self._matrix_rows(address, warps, len(values), "write", line)
        words = np.stack([value.reshape(-1, LANES)[warps] for value in values], 1)
        rows = words.view(np.uint16).reshape(-1, len(values), 8, 8)
        if transposed:
            rows = rows.transpose(0, 1, 3, 2)
        self.wave.shared.write(offsets.ravel(), rows.reshape(-1, 8), 2, 8)

    def _matrix_rows(self, address: Array, warps: slice | Array, count: int, kind: str, line: int) -> Offsets:
        lanes = np.arange(self.n).reshape(-1, LANES)[warps][:, : 8 * count].ravel()
        return self.shared_offsets(self.pick(address, lanes), lanes, 16, kind, line).reshape(-1, count, 8)
