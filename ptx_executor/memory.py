"""Memory of a launch: one arena of bytes for each state space, every access checked for bounds and alignment.

Addresses are made up and the same in every run. Global memory starts at `GLOBAL_BASE`; the other spaces start
at 0 and appear among generic addresses in a window of their own, `SHARED_WINDOW` and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .dtypes import UNSIGNED, Array
from .errors import MemoryAccessError

GLOBAL_BASE = 0x10_0000_0000
SHARED_WINDOW = 0x7000_0000_0000
LOCAL_WINDOW = 0x7100_0000_0000
PARAM_WINDOW = 0x7200_0000_0000
WINDOW_BITS = 40

_PAGE_BITS = 8
_PAGE = 1 << _PAGE_BITS

Offsets = NDArray[np.int64]
Place = Callable[[int], str]
"""Says for an index into the addresses of an access which thread it is."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Arena:
    """Bytes that can be read and written as rows of elements."""

    def __init__(self, size: int, fill: int) -> None:
        self.bytes = np.full(round_up(max(size, 16), 256), fill, np.uint8)
        self._rows: dict[tuple[int, int], Array] = {}

    def rows(self, total: int, element: int) -> Array:
        """The arena as `[rows, total // element]` unsigned elements, a row being `total` bytes."""
        key = (total, element)
        if key not in self._rows:
            self._rows[key] = self.bytes.view(UNSIGNED[element]).reshape(-1, total // element)
        return self._rows[key]

    def read(self, offsets: Offsets, element: int, count: int) -> Array:
        """`[n, count]` elements from `offsets [n]`, which are multiples of `element * count`."""
        total = element * count
        return self.rows(total, element)[offsets // total]

    def write(self, offsets: Offsets, values: Array, element: int, count: int) -> None:
        total = element * count
        self.rows(total, element)[offsets // total] = values


def _check_alignment(address: Offsets, size: int, what: str, place: Place) -> None:
    wrong = (address & (size - 1)) != 0
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise MemoryAccessError(
            f"{place(at)}: {what} address {int(address[at]):#x} is not a multiple of {size}"
        )


@dataclass(frozen=True)
class Region:
    """A stretch of global memory that may be touched: `[start, start + size)` in bytes from `GLOBAL_BASE`."""

    name: str
    start: int
    size: int
    writable: bool


class GlobalMemory(Arena):
    """Global and constant memory: the variables of the module and what the arguments point at.

    Regions keep a page of 256 bytes between each other, so that no offset by a few elements ends in the next
    one.
    """

    def __init__(self, regions: list[Region]) -> None:
        end = max((r.start + r.size for r in regions), default=0)
        super().__init__(round_up(end, _PAGE) + _PAGE, 0xFF)
        self.regions = regions
        pages = self.bytes.size >> _PAGE_BITS
        self._first = np.zeros(pages, np.int64)
        self._limit = np.zeros(pages, np.int64)
        self._store_limit = np.zeros(pages, np.int64)
        for region in regions:
            touched = slice(
                region.start >> _PAGE_BITS, round_up(region.start + region.size, _PAGE) >> _PAGE_BITS
            )
            self._first[touched] = region.start
            self._limit[touched] = region.start + region.size
            self._store_limit[touched] = region.start + region.size if region.writable else 0
        self._unchanging: NDArray[np.bool_] | None = None  # bytes read by `ld.global.nc`
        self._stored = np.zeros(self.bytes.size, bool)

    def offsets(self, address: Array, size: int, place: Place, store: bool = False) -> Offsets:
        """Byte offsets into the arena for `address [n]` (uint64).

        Raises:
            MemoryAccessError: if one access of `size` bytes is not aligned, not within one region, or is a
                store to a region that is read-only.
        """
        offset = self.spans(address, size, place, store)
        _check_alignment(offset, size, "global", place)
        if store:
            self._note_stored(offset, size, place)
        return offset

    def note_unchanging(self, address: Array, size: int, place: Place) -> None:
        """Bytes that are read past the coherent caches: a launch that stores to them too has no defined
        result.

        Raises:
            MemoryAccessError: it did so before. What is stored later is refused by `offsets`.
        """
        offset = self.offsets(address, size, place)
        if self._unchanging is None:
            self._unchanging = np.zeros(self.bytes.size, bool)
        self._unchanging.reshape(-1, size)[offset // size] = True
        self._refuse_both(offset, size, place, self._stored)

    def _note_stored(self, offset: Offsets, size: int, place: Place) -> None:
        self._stored.reshape(-1, size)[offset // size] = True
        if self._unchanging is not None:
            self._refuse_both(offset, size, place, self._unchanging)

    @staticmethod
    def _refuse_both(offset: Offsets, size: int, place: Place, before: NDArray[np.bool_]) -> None:
        both = before.reshape(-1, size)[offset // size].any(1)
        if both.any():
            at = int(np.flatnonzero(both)[0])
            raise MemoryAccessError(
                f"{place(at)}: the launch stores to global address {int(offset[at]) + GLOBAL_BASE:#x} and "
                "reads it by ld.global.nc, which sees unchanging memory alone"
            )

    def spans(self, address: Array, size: int, place: Place, store: bool = False) -> Offsets:
        """`offsets` for any number of bytes, which need not be aligned."""
        offset = address.astype(np.int64) - GLOBAL_BASE
        page = offset >> _PAGE_BITS
        limit = (self._store_limit if store else self._limit).take(page, mode="clip")
        good = (offset >= self._first.take(page, mode="clip")) & (offset + size <= limit)
        if not good.all():
            at = int(np.flatnonzero(~good)[0])
            raise MemoryAccessError(f"{place(at)}: {self._explain(int(offset[at]), size, store)}")
        return offset

    def _explain(self, offset: int, size: int, store: bool) -> str:
        def distance(region: Region) -> int:
            return max(region.start - offset, offset + size - region.start - region.size)

        access = (
            f"{size} bytes {'stored to' if store else 'loaded from'} global address {offset + GLOBAL_BASE:#x}"
        )
        if not self.regions:
            return f"{access}: the launch has no global memory"
        near = min(self.regions, key=distance)
        if distance(near) <= 0:
            return f"{access}, which is in {near.name}, and that is read-only"
        where = "before the start" if offset < near.start else "past the end"
        return f"{access}, {distance(near)} bytes {where} of {near.name} ({near.size} bytes)"


class BlockMemory(Arena):
    """Memory of `size` bytes for every block (shared) or every thread (local); starts as 0xff."""

    def __init__(self, space: str, owners: int, size: int) -> None:
        self.space, self.size, self.stride = space, size, round_up(max(size, 1), 16)
        super().__init__(owners * self.stride, 0xFF)

    def offsets(self, address: Array, owner: NDArray[np.int64], size: int, place: Place) -> Offsets:
        """Byte offsets into the arena for `address [n]` in the copies of `owner [n]`, checked."""
        offset = address.astype(np.int64)
        if offset.size and (int(offset.max()) + size > self.size or int(offset.min()) < 0):
            at = int(np.flatnonzero((offset + size > self.size) | (offset < 0))[0])
            raise MemoryAccessError(
                f"{place(at)}: {size} bytes at {self.space} address {int(offset[at]):#x}, outside the "
                f"{self.size} bytes of {self.space} memory"
            )
        _check_alignment(offset, size, self.space, place)
        return offset + owner * self.stride
