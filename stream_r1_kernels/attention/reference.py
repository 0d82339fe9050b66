"""The meaning of the attention ops, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .mask import ChunkMask


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v in at least float32. A query that sees no key gives zeros and lse = -inf.

    Args:
        q: [B, T, H, D]. k, v: [B, Tk, H, D].
        visible: bool [T, Tk], or None for all.

    Returns:
        out [B, T, H, D] in q's dtype, lse [B, H, T] in float32 (float64 for float64 inputs).
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(exact) * scale, k.to(exact))
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)  # [B, H, T]
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.to(exact)).to(q.dtype), lse


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, mask: ChunkMask, scale: float) -> Tensor:
    frames = mask.visible(mask.frames(q.shape[1])).to(q.device)
    visible = frames.repeat_interleave(mask.tokens_per_frame, 0).repeat_interleave(mask.tokens_per_frame, 1)
    return dense_attention(q, k, v, scale, visible)[0]


def cached_chunk_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, past_k: Tensor | None, past_v: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    keys = [part for part in (None if past_k is None else past_k.detach(), k) if part is not None]
    values = [part for part in (None if past_v is None else past_v.detach(), v) if part is not None]
    return dense_attention(q, torch.cat(keys, 1), torch.cat(values, 1), scale)
