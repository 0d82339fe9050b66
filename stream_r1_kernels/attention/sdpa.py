"""The attention ops by torch's own dense attention (`scaled_dot_product_attention`), block by visible block.

Exact, with gradients, for any dtype and width that torch takes: it stands in where no kernel of this package
fits, and is what `backend="auto"` takes where torch's kernel is likely the faster one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .reference import block_by_block, dense_attention

_QUERIES = 512  # whose scores are in memory at a time, for a log-sum-exp
_FEWEST_KEYS = 16  # torch's kernel for CPUs gives zeros for a NaN query that sees less than a vector of keys


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, table: Sequence[int], scale: float) -> Tensor:
    return block_by_block(q, k, v, table, lambda q, k, v: _attend(q, k, v, scale))


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
    if k.shape[1] < _FEWEST_KEYS and q.device.type == "cpu":
        return dense_attention(q, k, v, scale)[0]
    if scale < 0:  # kernels take the largest score before the scale
        q, scale = -q, -scale
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


class _LogSumExp(torch.autograd.Function):
    """log sum exp of the scaled scores, [B, H, T] float32.

    With p the weights, its gradients are grad_q = scale g (p k) and grad_k = scale p^T (g q): an attention
    with the keys as values, and the gradient of those values. Second derivatives are those of torch's
    attention, which are right or refused.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, scale: float) -> Tensor:
        keys = k.permute(0, 2, 3, 1)  # [B, H, D, Tk]
        parts = [
            torch.matmul(part.transpose(1, 2).float() * scale, keys.float()).logsumexp(-1)
            for part in q.split(_QUERIES, 1)
        ]
        return torch.cat(parts, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        q, k, ctx.scale = inputs
        ctx.save_for_backward(q, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # in float32: the gradient times q may leave the range of float16 where what is made of it does not
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        dtype = saved[0].dtype
        q, k = (x.to(torch.promote_types(dtype, torch.float32)) for x in saved)
        scale = ctx.scale
        again = torch.is_grad_enabled()  # the gradients are differentiated
        weight = (grad * scale).transpose(1, 2).unsqueeze(-1)  # [B, T, H, 1]
        with torch.enable_grad():
            values = k.view_as(k) if again and k.requires_grad else k.detach().requires_grad_()
            mean = _attend(q if again else q.detach(), k if again else k.detach(), values, scale)  # p k
        (found,) = torch.autograd.grad(mean, values, weight * q, allow_unused=True, create_graph=again)
        grad_k = torch.zeros_like(k) if found is None else found
        return (weight * (mean if again else mean.detach())).to(dtype), grad_k.to(dtype), None
