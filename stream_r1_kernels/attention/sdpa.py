"""The attention ops by torch's own dense attention (`scaled_dot_product_attention`), block by visible block.

Exact, with gradients, for any dtype and width that torch takes: it stands in where no kernel of this package
fits, and is what `backend="auto"` takes where torch's kernel is likely the faster one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .mask import ChunkMask

_QUERIES = 512  # whose scores are in memory at a time, for a log-sum-exp


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, mask: ChunkMask, scale: float) -> Tensor:
    tokens = mask.tokens_per_frame
    parts = []
    for start, end, ranges in mask.blocks(mask.frames(q.shape[1])):
        seen = [slice(first * tokens, last * tokens) for first, last in ranges]
        keys, values = (torch.cat([x[:, part] for part in seen], 1) for x in (k, v))
        parts.append(_attend(q[:, start * tokens : end * tokens], keys, values, scale))
    return torch.cat(parts, 1) if parts else torch.zeros_like(q)


def cached_chunk_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out, and the log-sum-exp if asked: it takes another pass over the keys."""
    keys = [part for part in (None if past_k is None else past_k.detach(), k) if part is not None]
    values = [part for part in (None if past_v is None else past_v.detach(), v) if part is not None]
    # one piece is read where it lies
    all_k = keys[0] if len(keys) == 1 else torch.cat(keys, 1)
    all_v = values[0] if len(values) == 1 else torch.cat(values, 1)
    out = _attend(q, all_k, all_v, scale)
    return out, _LogSumExp.apply(q, all_k, scale) if with_lse else None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if k.shape[1] == 0:  # sees nothing: zeros, and gradients that are zero
        return torch.einsum("bqhd,bkhd,bkhe->bqhe", q, k, v)
    if scale < 0:  # kernels take the largest score before the scale
        q, scale = -q, -scale
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


class _LogSumExp(torch.autograd.Function):
    """log sum exp of the scaled scores, [B, H, T] float32.

    With p the weights, its gradients are grad_q = scale g (p k) and grad_k = scale p^T (g q): an attention
    with the keys as values, and the gradient of those values.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, q: Tensor, k: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.scale = scale  # type: ignore[attr-defined]
        keys = k.permute(0, 2, 3, 1)  # [B, H, D, Tk]
        parts = [
            torch.matmul(part.transpose(1, 2).float() * scale, keys.float()).logsumexp(-1)
            for part in q.split(_QUERIES, 1)
        ]
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = ctx.scale  # type: ignore[attr-defined]
        weight = (grad * scale).transpose(1, 2).unsqueeze(-1)  # [B, T, H, 1]
        with torch.enable_grad():
            values = k.detach().requires_grad_()
            mean = _attend(q.detach(), k.detach(), values, scale)  # p k
        (grad_k,) = torch.autograd.grad(mean, values, (weight * q).to(mean.dtype), allow_unused=True)
        return (weight * mean.detach()).to(q.dtype), torch.zeros_like(k) if grad_k is None else grad_k, None
