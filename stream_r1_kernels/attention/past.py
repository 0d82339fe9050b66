"""What a chunk sees before itself."""

from typing import NamedTuple

from torch import Tensor


class Past(NamedTuple):
    """Keys and values of earlier chunks, rotated and normalised, in any order. Never gets a gradient.

    Attributes:
        k: keys, `[B, Tp, H, D]`.
        v: values, `[B, Tp, H, D]`.
        holds_fresh: the fresh chunk's own keys and values already lie inside `k` and `v`, in the slot that
            they will keep.
    """

    k: Tensor
    v: Tensor
    holds_fresh: bool
