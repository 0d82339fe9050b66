"""The backward of the attention ops beside the CUDA kernels: torch's matrix products, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..schemas import LIBRARIES
from .mask import ChunkMask

_QUERIES = 512  # at a time: bounds the memory of the scores

# Queries [begin, end), and the ranges of fresh keys that they see.
Block = tuple[int, int, list[tuple[int, int]]]


def _heads_first(x: Tensor) -> Tensor:
    """[B, T, H, D] -> float32 [B * H, T, D]."""
    return x.float().transpose(1, 2).flatten(0, 1)


def _heads_last(x: Tensor, like: Tensor) -> Tensor:
    return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2).to(like.dtype).contiguous()


def _backward(
    blocks: Sequence[Block],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    qkv: tuple[Tensor, Tensor, Tensor],
    past: tuple[Tensor, Tensor] | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = exp(scale q k^T - lse), delta = sum(grad_out out) - grad_lse, ds = p (grad_out v^T - delta):

    grad_q += scale ds k,  grad_k += scale ds^T q,  grad_v += p^T grad_out. All queries see all of the past.
    """
    q, k, v = (_heads_first(x) for x in qkv)
    upstream, lse = _heads_first(grad_out), lse.flatten(0, 1).unsqueeze(2)  # lse, delta [B * H, T, 1]
    delta = (upstream * _heads_first(out)).sum(2, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.float().flatten(0, 1).unsqueeze(2)
    old = None if past is None or past[0].shape[1] == 0 else [_heads_first(x) for x in past]
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
    for first, last, ranges in blocks:
        for begin in range(first, last, _QUERIES):
            rows = slice(begin, min(begin + _QUERIES, last))
            own_q, own_upstream = q[:, rows], upstream[:, rows]

            def scores(keys: Tensor, values: Tensor, rows: slice = rows) -> tuple[Tensor, Tensor]:
                p = torch.bmm(q[:, rows], keys.mT).mul_(scale).sub_(lse[:, rows]).exp_()
                ds = torch.bmm(upstream[:, rows], values.mT).sub_(delta[:, rows]).mul_(p).mul_(scale)
                grad_q[:, rows].baddbmm_(ds, keys)
                return p, ds

            if old is not None:
                scores(old[0], old[1])
            for start, stop in ranges:
                p, ds = scores(k[:, start:stop], v[:, start:stop])
                grad_k[:, start:stop].baddbmm_(ds.mT, own_q)
                grad_v[:, start:stop].baddbmm_(p.mT, own_upstream)
    return _heads_last(grad_q, qkv[0]), _heads_last(grad_k, qkv[1]), _heads_last(grad_v, qkv[1])


def cached_chunk_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    everything: Block = (0, q.shape[1], [(0, k.shape[1])] if k.shape[1] else [])
    past = None if past_k is None or past_v is None else (past_k, past_v)
    return _backward([everything], grad_out, grad_lse, (q, k, v), past, out, lse, scale)


def chunk_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tokens_per_frame: int,
    frames_per_chunk: int,
    window_frames: int | None,
    sink_frames: int,
    first_chunk_frames: int | None,
    teacher_forcing: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = ChunkMask(
        tokens_per_frame, frames_per_chunk, window_frames, sink_frames, first_chunk_frames, teacher_forcing
    )
    blocks = [
        (
            begin * tokens_per_frame,
            end * tokens_per_frame,
            [(a * tokens_per_frame, b * tokens_per_frame) for a, b in seen],
        )
        for begin, end, seen in mask.blocks(mask.frames(q.shape[1]))
    ]
    return _backward(blocks, grad_out, None, (q, k, v), None, out, lse, scale)


BACKWARDS = {f.__name__: f for f in (cached_chunk_attention_backward, chunk_attention_backward)}
for _library in LIBRARIES:
    for _name, _function in BACKWARDS.items():
        _library.impl(_name, _function, "CUDA")
