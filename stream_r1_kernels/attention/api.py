"""The public attention functions."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..arguments import without_autocast
from ..backends import resolve
from ..registration import kernels
from . import reference, sdpa
from .mask import RangeMask
from .past import Past
from .validation import check_cached, check_chunks, check_lent


def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: RangeMask, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention of all chunks of a sequence at once, each to what `mask` lets it see. Forward and backward.

    Only visible blocks are computed. A query that sees nothing gives zeros (in a `ChunkMask` there is none).

    Args:
        q, k, v: `[B, T, H, D]`, any strides; for a `ChunkMask` T is a whole number of frames (2 halves of
            them when it is teacher forcing).
        mask: a `ChunkMask`, or another `RangeMask`.
        scale: factor of the scores, default 1 / sqrt(D).
        backend: "auto", "cpu", "cuda", "triton", "sdpa" or "reference"; an explicit choice never falls back.

    Returns:
        `[B, T, H, D]` in q's dtype; sums are in float32.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that do not fit.
        RuntimeError: a backend that can't be used here.
    """
    op = "chunk_attention"
    check_chunks(op, q, k, v, mask, scale)
    table = mask.table(q.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = resolve(backend, op, q, k, v)
    if chosen == "reference":
        with without_autocast(q):
            return reference.chunk_attention(q, k, v, table, scale)
    if chosen == "sdpa":
        with without_autocast(q):
            return sdpa.chunk_attention(q, k, v, table, scale)
    if chosen == "triton":
        from . import triton_attention  # needs Triton, which is imported for this alone

        return triton_attention.chunk_attention(q, k, v, table, scale)
    out, _ = kernels(q, k, v).chunk_attention.default(q, k, v, table, scale)
    return out


@overload
def cached_chunk_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past: Past | None,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def cached_chunk_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past: Past | None,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def cached_chunk_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past: Past | None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One chunk attends to the past and to itself, without a mask.

    past.holds_fresh = True (sampling): the fresh keys and values lie inside `past` already; `k` and `v` are
    not read and may be None. No gradients: a q, k or v that requires grad is refused.
    past.holds_fresh = False (training): the keys are [past | fresh]. q, k and v get gradients, the past
    never does. past = None: the chunk sees itself alone.

    Args:
        q, k, v: the fresh chunk, `[B, T, H, D]`; k and v may have another T than q; any strides.
        past: keys and values `[B, Tp, H, D]`, Tp >= 0.
        scale: factor of the scores, default 1 / sqrt(D).
        return_lse: also return the log-sum-exp of the scaled scores, `[B, H, T]` float32 (differentiable).
        backend: as for `chunk_attention`.

    Returns:
        `[B, T, H, D]` in q's dtype, and the log-sum-exp if asked. Without any key: zeros and -inf.

    Raises:
        ValueError: shapes that do not fit, or gradients that would be lost.
        TypeError: dtypes that do not fit.
        RuntimeError: a backend that can't be used here.
    """
    op = "cached_chunk_attention"
    check_cached(op, q, k, v, past, scale)
    past_k, past_v = (None, None) if past is None else (past.k, past.v)
    if past is not None and past.holds_fresh:
        k = v = None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pieces = (k is not None) + (past_k is not None and past_k.shape[1] > 0)
    chosen = resolve(backend, op, q, k, v, past_k, past_v, pieces=pieces)
    lse: Tensor | None
    if chosen == "reference":
        with without_autocast(q):
            out, lse = reference.cached_chunk_attention(q, k, v, past_k, past_v, scale)
    elif chosen == "sdpa":
        with without_autocast(q):
            out, lse = sdpa.cached_chunk_attention(q, k, v, past_k, past_v, scale, return_lse)
    elif chosen == "triton":
        from . import triton_attention

        out, lse = triton_attention.cached_chunk_attention(q, k, v, past_k, past_v, scale)
    else:
        ops = kernels(q, k, v, past_k, past_v)
        out, lse = ops.cached_chunk_attention.default(q, k, v, past_k, past_v, scale)
        lse = lse.float() if return_lse else lse  # on a CPU it is in float64, for the backward
    saved = None if chosen in ("reference", "sdpa") else past  # those save copies
    if saved is not None and not torch.compiler.is_compiling() and out.grad_fn is not None:
        # torch's own error, of a saved tensor that was written since, does not say what to do
        out.grad_fn.register_prehook(lambda _: check_lent(op, saved))
    if not return_lse:
        return out
    assert lse is not None
    return out, lse
