"""Checks of the attention ops' arguments, made once, at the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_finite, check_float_tensor, check_tensor
from .mask import RangeMask
from .past import Past


def check_qkv(op: str, q: Tensor, **others: Tensor | None) -> None:
    """q `[B, T, H, D]`; the others `[B, any, H, D]` of the same dtype and device."""
    check_float_tensor(op, "q", q)
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"{op}: q: expected [B, T, H, D > 0], got shape {tuple(q.shape)}")
    batch, _, heads, width = q.shape
    for name, other in others.items():
        if other is None:
            continue
        check_tensor(op, name, other)
        if other.dim() != 4 or other.shape[0] != batch or other.shape[2] != heads or other.shape[3] != width:
            raise ValueError(
                f"{op}: {name}: expected [{batch}, T, {heads}, {width}] as q, got {tuple(other.shape)}"
            )
        if other.dtype != q.dtype:
            raise TypeError(f"{op}: {name}: expected {q.dtype} as q, got {other.dtype}")
        if other.device != q.device:
            raise ValueError(f"{op}: {name}: expected device {q.device} as q, got {other.device}")


def check_same_length(op: str, name: str, a: Tensor, other_name: str, b: Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{op}: {name}: expected {b.shape[1]} tokens as {other_name}, got {a.shape[1]}")


def check_chunks(op: str, q: Tensor, k: Tensor, v: Tensor, mask: RangeMask, scale: float | None) -> None:
    check_tensor(op, "k", k)
    check_tensor(op, "v", v)
    check_qkv(op, q, k=k, v=v)
    check_same_length(op, "k", k, "q", q)
    check_same_length(op, "v", v, "q", q)
    if not isinstance(mask, RangeMask):
        raise TypeError(f"{op}: mask: expected a ChunkMask or another RangeMask, got {type(mask).__name__}")
    if scale is not None:
        check_finite(op, "scale", scale)


def check_cached(
    op: str, q: Tensor, k: Tensor | None, v: Tensor | None, past: Past | None, scale: float | None
) -> None:
    if past is None:
        check_qkv(op, q, k=k, v=v)
    else:
        if not isinstance(past, Past):
            raise TypeError(f"{op}: past: expected a Past or None, got {type(past).__name__}")
        check_tensor(op, "past.k", past.k)
        check_tensor(op, "past.v", past.v)
        check_lent(op, past)
        check_qkv(op, q, k=k, v=v, **{"past.k": past.k, "past.v": past.v})
    _check_past(op, q, k, v, past)
    if k is not None and v is not None:
        check_same_length(op, "v", v, "k", k)
    if scale is not None:
        check_finite(op, "scale", scale)


def check_lent(op: str, past: Past) -> None:
    """A view of a cache that was written again since is empty, see `cache_reuse.TrackedViews`."""
    if past.k.shape == (0,):
        raise ValueError(
            f"{op}: past: expected what the ChunkCache held when it gave it out, but the memory was written "
            "since, by a later chunk or after reset(); take past(copy=True) where it is needed for longer"
        )


def _check_past(op: str, q: Tensor, k: Tensor | None, v: Tensor | None, past: Past | None) -> None:
    """The combinations that `cached_chunk_attention` knows; see its docstring."""
    if (k is None) != (v is None):
        raise ValueError(f"{op}: k, v: expected both or neither, got {'v' if k is None else 'k'} alone")
    if past is None:
        if k is None:
            raise ValueError(f"{op}: past: expected a Past when k and v are None, got None")
    else:
        check_same_length(op, "past.v", past.v, "past.k", past.k)
        if not past.holds_fresh and k is None:
            raise ValueError(
                f"{op}: k, v: expected the fresh keys and values, as past.holds_fresh is False; got None"
            )
        if torch.is_grad_enabled():
            _refuse_gradients(op, q, k, v, past)


def _refuse_gradients(op: str, q: Tensor, k: Tensor | None, v: Tensor | None, past: Past) -> None:
    if past.k.requires_grad or past.v.requires_grad:
        raise ValueError(
            f"{op}: past: expected tensors without requires_grad, as the past gets no gradient; detach them"
        )
    if past.holds_fresh and any(x is not None and x.requires_grad for x in (q, k, v)):
        raise ValueError(
            f"{op}: past.holds_fresh: expected False where q, k or v require grad, got True: fresh keys "
            "inside the past would get no gradient. Pass them as k and v, or use torch.no_grad()"
        )
