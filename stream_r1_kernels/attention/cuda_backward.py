"""The backward of the attention ops beside the CUDA kernels: torch's matrix products, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registration import LIBRARIES
from .mask import Block, blocks_of

_QUERIES = 512  # at a time: bounds the memory of the scores


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
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = softmax(scale q k^T), dp = grad_out v^T, delta = sum(p dp) - grad_lse, ds = p (dp - delta):

    grad_q += scale ds k,  grad_k += scale ds^T q,  grad_v += p^T grad_out. All queries see all of the past.
    The softmax is made again: at scores of 1e4 a float32 log-sum-exp is known to 5e-4 alone.
    """
    q, k, v = (_heads_first(x) for x in qkv)
    upstream = _heads_first(grad_out)
    of_lse = None if grad_lse is None else grad_lse.float().flatten(0, 1).unsqueeze(2)  # [B * H, T, 1]
    old = None if past is None or past[0].shape[1] == 0 else (_heads_first(past[0]), _heads_first(past[1]))
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
    for first, last, ranges in blocks:
        for begin in range(first, last, _QUERIES):
            rows = slice(begin, min(begin + _QUERIES, last))
            own_q, own_upstream = q[:, rows], upstream[:, rows]
            seen = [(k[:, start:stop], v[:, start:stop]) for start, stop in ranges]
            pieces = seen if old is None else [old, *seen]
            if not pieces:
                continue
            p = torch.cat([torch.bmm(own_q, keys.mT) for keys, _ in pieces], 2).mul_(scale)
            highest = p.amax(2, keepdim=True)
            p.sub_(highest).exp_().div_(p.sum(2, keepdim=True))
            p.masked_fill_(highest == float("-inf"), 0.0)  # no key has a weight
            ds = torch.cat([torch.bmm(own_upstream, values.mT) for _, values in pieces], 2)
            delta = (p * ds).sum(2, keepdim=True)
            if of_lse is not None:
                delta -= of_lse[:, rows]
            ds.sub_(delta).mul_(p).mul_(scale)
            sizes = [keys.shape[1] for keys, _ in pieces]
            of_pieces = list(zip(pieces, p.split(sizes, 2), ds.split(sizes, 2), strict=True))
            for (keys, _), _, ds_here in of_pieces:
                grad_q[:, rows].baddbmm_(ds_here, keys)
            for (start, stop), (_, p_here, ds_here) in zip(
                ranges, of_pieces[len(of_pieces) - len(ranges) :], strict=True
            ):
                grad_k[:, start:stop].baddbmm_(ds_here.mT, own_q)
                grad_v[:, start:stop].baddbmm_(p_here.mT, own_upstream)
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
    return _backward([everything], grad_out, grad_lse, (q, k, v), past, scale)


def chunk_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(blocks_of(table), grad_out, None, (q, k, v), None, scale)


BACKWARDS = {f.__name__: f for f in (cached_chunk_attention_backward, chunk_attention_backward)}
for _library in LIBRARIES:
    for _name, _function in BACKWARDS.items():
        _library.impl(_name, _function, "CUDA")
