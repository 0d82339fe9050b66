"""Atomic updates by many lanes at once, in a random order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .dtypes import NUMPY, Array, bf16_to_f32, f32_to_bf16, is_float
from .errors import UnsupportedInstruction

_IN_PLACE = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _increment(old: Array, limit: Array) -> Array:
    return np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1))


def _decrement(old: Array, limit: Array) -> Array:
    return np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))


def _compare_and_swap(old: Array, expected: Array, new: Array) -> Array:
    return np.where(old == expected, new, old)


def _new_value(action: str, kind: str) -> Callable[..., Array]:
    """The function (old, operands...) -> new on unsigned bits."""
    target = NUMPY[kind]
    if action == "exch":
        return lambda old, b: b
    if action == "cas":
        return _compare_and_swap
    if action in ("inc", "dec"):
        return {"inc": _increment, "dec": _decrement}[action]
    if is_float(kind) and action not in ("add", "min", "max"):
        raise UnsupportedInstruction(f"atom.{action}.{kind}")
    function = {"min": np.fmin, "max": np.fmax}.get(action, np.add) if is_float(kind) else _IN_PLACE[action]
    if kind.startswith("bf16"):

        def on_bf16(old: Array, b: Array) -> Array:
            x, y = (bf16_to_f32(np.ascontiguousarray(v).view(np.uint16)) for v in (old, b))
            return f32_to_bf16(function(x, y)).view(old.dtype)

        return on_bf16
    return lambda old, b: function(np.ascontiguousarray(old).view(target), b.view(target)).view(old.dtype)


def update(
    cells: Array,
    at: NDArray[np.int64],
    action: str,
    kind: str,
    values: list[Array],
    rng: np.random.Generator,
    wants: bool,
) -> Array:
    """Apply `action` to `cells[at]`, one lane after the other.

    Args:
        cells: memory as unsigned elements of the type's width.
        at: `[n]` index for each lane; lanes may meet.
        action: add, min, max, and, or, xor, exch, cas, inc, dec.
        kind: PTX type of the values.
        values: operands, `[n]` unsigned each.
        rng: decides the order of the lanes.
        wants: whether the old values are of interest.

    Returns:
        `[n]` unsigned values that each lane found; zeros where nobody wants them.
    """
    old = np.zeros(at.size, cells.dtype)
    order = rng.permutation(at.size)
    if not wants and action in _IN_PLACE and not kind.startswith("bf16") and not kind.endswith("x2"):
        target = NUMPY[kind]
        function = (
            {"min": np.fmin, "max": np.fmax}.get(action, np.add) if is_float(kind) else _IN_PLACE[action]
        )
        function.at(cells.view(target), at[order], values[0][order].view(target))
        return old
    new_value = _new_value(action, kind)
    for lanes in _turns(at, order):
        old[lanes] = cells[at[lanes]]
        cells[at[lanes]] = new_value(old[lanes], *(value[lanes] for value in values))
    return old


def _turns(at: NDArray[np.int64], order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The lanes of `order`, split so that no two of a part meet in a cell and each cell keeps its order."""
    by_cell = order[np.argsort(at[order], kind="stable")]
    cell = at[by_cell]
    place = np.arange(cell.size)
    starts = np.concatenate([[True], cell[1:] != cell[:-1]])
    turn = place - np.maximum.accumulate(np.where(starts[: cell.size], place, 0))
    by_turn = np.argsort(turn, kind="stable")
    return np.split(by_cell[by_turn], np.cumsum(np.bincount(turn))[:-1]) if cell.size else []
