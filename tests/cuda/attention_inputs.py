"""Tensors for the attention ops as a model has them, and masks: for nvcc's kernels and for Triton's."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stream_r1_kernels import ChunkMask, RangeMask

MASKS = [
    ChunkMask(20, 3),
    ChunkMask(20, 3, window_frames=5, sink_frames=1),  # a sink within a chunk, a window across chunks
    ChunkMask(48, 3, window_frames=3, first_chunk_frames=1),
    ChunkMask(20, 2, teacher_forcing=True),
    ChunkMask(20, 2, window_frames=3, sink_frames=1, first_chunk_frames=1, teacher_forcing=True),
]


@dataclass(frozen=True)
class AnyRanges(RangeMask):
    """For 210 tokens: five ranges, of which two touch and one is a single key; queries that see nothing."""

    def blocks(self, tokens: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
        many = [(0, 7), (20, 90), (90, 100), (130, 131), (150, 210)]
        return [(0, 30, []), (30, 200, many), (200, 210, [(3, 5)])]


EXAMPLE = Path(__file__).parents[2] / "examples/dilated_mask.py"
OWN_MASKS = [(runpy.run_path(str(EXAMPLE))["DilatedMask"](40), 330), (AnyRanges(), 210)]  # with their tokens


def visible_tokens(mask: ChunkMask, frames: int) -> Tensor:
    """bool [tokens, tokens]: which keys each query sees."""
    return mask.visible(frames * mask.tokens_per_frame * (2 if mask.teacher_forcing else 1))


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse [B, H, T] of all scores at once, where `visible` [T, Tk] lets them be."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(), v)
    return out, scores.logsumexp(-1)


def fused(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as slices of one projection."""
    whole = torch.randn(batch, tokens, 3, heads, head_dim).to(dtype)
    return whole[:, :, 0], whole[:, :, 1], whole[:, :, 2]


class Sizes(NamedTuple):
    """Of a call of `cached_chunk_attention`; queries, past and fresh in tokens."""

    batch: int
    queries: int
    past: int
    fresh: int
    heads: int
    head_dim: int

    def draw(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the past's keys and values."""
        torch.manual_seed(self.queries)
        q, _, _ = fused(self.batch, self.queries, self.heads, self.head_dim, dtype)
        _, k, v = fused(self.batch, self.fresh, self.heads, self.head_dim, dtype)
        _, past_k, past_v = fused(self.batch, self.past, self.heads, self.head_dim, dtype)
        return q, k, v, past_k, past_v
