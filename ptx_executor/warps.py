"""Instructions that move data between the 32 lanes of a warp.

All lanes of a row of warps are one array `[n]`. `mask` is the lanes that execute the instruction (`None` for
all), `members` the mask operand of each lane.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .dtypes import Array

LANES = 32
_BITS = np.uint32(1) << np.arange(LANES, dtype=np.uint32)
_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip

Mask = NDArray[np.bool_] | None


def spread(values: Array, n: int) -> Array:
    """`values` for every lane."""
    return values if values.size == n else np.broadcast_to(values, (n,))


def ballot(predicate: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """`[n]` flags to `[n]` masks, the same in all lanes of a warp."""
    packed = np.where(predicate.reshape(-1, LANES), _BITS, np.uint32(0)).sum(1, dtype=np.uint32)
    return np.repeat(packed, LANES)


def _together(members: Array | None, n: int, mask: Mask) -> NDArray[np.bool_]:
    """`[n, 32]`: which lanes of its warp each lane works with."""
    active = np.ones(n, bool) if mask is None else mask
    together = np.repeat(active.reshape(-1, LANES), LANES, axis=0)
    if members is None:
        return together
    return together & ((spread(members, n)[:, None] & _BITS) != 0)


def shuffle(
    mode: str, value: Array, by: Array, control: Array, n: int, mask: Mask
) -> tuple[Array, NDArray[np.bool_]]:
    """`shfl.sync`: for each lane the value of another one, and whether that one was in range.

    A lane that does not take part gives 0xffffffff: PTX leaves its value open.
    """
    value, by, control = (spread(v, n) for v in (value, by, control))
    lane = np.tile(np.arange(LANES, dtype=np.int64), n // LANES)
    shift = (by & np.uint32(31)).astype(np.int64)
    clamp = (control & np.uint32(31)).astype(np.int64)
    segment = ((control >> np.uint32(8)) & np.uint32(31)).astype(np.int64)
    last = (lane & segment) | (clamp & ~segment)
    if mode == "up":
        source = lane - shift
        good = source >= last
    else:
        source = {"down": lane + shift, "bfly": lane ^ shift, "idx": (lane & segment) | (shift & ~segment)}[
            mode
        ]
        good = source <= last
    source = np.where(good, source, lane) + np.arange(n) // LANES * LANES
    result = value[source]
    if mask is not None:
        result = np.where(mask[source], result, np.uint32(0xFFFFFFFF))
    return result, good


def vote(mode: str, predicate: NDArray[np.bool_], members: Array | None, n: int, mask: Mask) -> Array:
    """`vote.all`, `.any`, `.uni` (as predicates) and `.ballot` (as masks)."""
    predicate = spread(predicate, n)
    together = _together(members, n, mask)
    votes = np.repeat(predicate.reshape(-1, LANES), LANES, axis=0)
    if mode == "ballot":
        return np.where(votes & together, _BITS, np.uint32(0)).sum(1, dtype=np.uint32)
    if mode == "any":
        return np.any(votes & together, 1)
    everyone: NDArray[np.bool_] = np.all(votes | ~together, 1)
    return everyone if mode == "all" else everyone | ~(votes & together).any(1)


def reduce(action: str, value: Array, members: Array, n: int, mask: Mask) -> Array:
    """`redux.sync`: the members' values combined."""
    together = _together(members, n, mask)
    values = np.repeat(spread(value, n).reshape(-1, LANES), LANES, axis=0)
    limits = np.iinfo(value.dtype)
    neutral = {"min": limits.max, "max": limits.min, "and": limits.max if limits.min == 0 else -1}.get(
        action, 0
    )
    return _REDUCTIONS[action].reduce(
        np.where(together, values, value.dtype.type(neutral)), axis=1, dtype=value.dtype
    )


def match(value: Array, members: Array, n: int, mask: Mask) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """`match.sync`: the members with the same value, and whether these are all of them."""
    together = _together(members, n, mask)
    value = spread(value, n)
    same = together & (np.repeat(value.reshape(-1, LANES), LANES, axis=0) == value[:, None])
    return np.where(same, _BITS, np.uint32(0)).sum(1, dtype=np.uint32), (same == together).all(1)


def with_carry(a: Array, b: Array, carry: Array | bool, subtract: bool) -> tuple[Array, NDArray[np.bool_]]:
    """a + b + carry, or a - b - borrow, of unsigned values, and the carry or borrow out of it."""
    extra = np.asarray(carry).astype(a.dtype)
    if subtract:
        first = a - b
        result = first - extra
        return result, (a < b) | (first < extra)
    first = a + b
    result = first + extra
    return result, (first < a) | (result < first)


def pack(parts: list[Array], kind: str) -> Array:
    """`mov d, {a, b, ...}`: elements to one wider register, the first one lowest."""
    return np.stack(np.broadcast_arrays(*parts), -1).view(kind)[..., 0]


def unpack(value: Array, kind: str, count: int) -> Array:
    """`mov {a, b, ...}, d`: `[n, count]` elements."""
    return np.ascontiguousarray(value).view(kind).reshape(-1, count).copy()
