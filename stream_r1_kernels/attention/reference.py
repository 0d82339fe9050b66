"""The meaning of the attention ops, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .mask import blocks_of


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v in at least float32. A query without a score above -inf gives zeros, lse = -inf.

    Args:
        q: [B, T, H, D]. k, v: [B, Tk, H, D].

    Returns:
        out [B, T, H, D] in q's dtype, lse [B, H, T] in float32 (float64 for float64 inputs).
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(exact) * scale, k.to(exact))
    nothing = (scores == float("-inf")).all(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0.0)
    lse = scores.logsumexp(-1).masked_fill(nothing.squeeze(-1), float("-inf"))  # [B, H, T]
    weights = scores.softmax(-1).masked_fill(nothing, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.to(exact)).to(q.dtype), lse


def block_by_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Sequence[int],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """`attend` on each block of queries and the keys and values that it sees, in one piece.

    Args:
        table: of `RangeMask.table`.

    What a block does not see is never read: a NaN there stays there, forward and backward.
    """
    parts = []
    for begin, end, ranges in blocks_of(table):
        keys, values = (
            torch.cat([x[:, first:last] for first, last in ranges or [(0, 0)]], 1) for x in (k, v)
        )
        parts.append(attend(q[:, begin:end], keys, values))
    return torch.cat(parts, 1) if parts else q * k * v  # without tokens


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, table: Sequence[int], scale: float) -> Tensor:
    return block_by_block(q, k, v, table, lambda q, k, v: dense_attention(q, k, v, scale)[0])


def cached_chunk_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, past_k: Tensor | None, past_v: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    keys = [part for part in (None if past_k is None else past_k.detach(), k) if part is not None]
    values = [part for part in (None if past_v is None else past_v.detach(), v) if part is not None]
    return dense_attention(q, torch.cat(keys, 1), torch.cat(values, 1), scale)
