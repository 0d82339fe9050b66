"""Bank conflicts of accesses to shared memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .dtypes import Array
from .warps import LANES

_BANKS = 32


def bank_conflicts(address: Array, lane: NDArray[np.int64], size: int) -> int:
    """Passes over the banks that an access of `size` bytes takes beyond those that its width needs.

    Args:
        address: `[n]` addresses within a block's shared memory.
        lane: `[n]` lanes, 32 to a warp; those of one warp go together, as many as make 128 bytes.
    """
    if not address.size:
        return 0
    together = min(LANES, 128 // max(size, 4))
    turn = np.repeat(lane // together, max(1, size // 4))
    words = (address.astype(np.int64)[:, None] // 4 + np.arange(max(1, size // 4))).ravel()
    turn, words = np.unique(np.stack([turn, words]), axis=1)  # lanes that read one word share it
    cells, counts = np.unique(turn * _BANKS + words % _BANKS, return_counts=True)
    turns, start = np.unique(cells // _BANKS, return_index=True)
    return int(np.maximum.reduceat(counts, start).sum() - turns.size)
