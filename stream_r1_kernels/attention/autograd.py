"""Gradients of the compiled attention ops, on any device."""

from typing import Any

import torch
from torch import Tensor

from ..registration import kernels, register_autograd, register_in_place, register_no_derivative


def _save_cached(ctx: Any, inputs: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *result)
    ctx.set_materialize_grads(False)


def _cached_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[5])
    op = kernels(grad_out, grad_lse, *saved).cached_chunk_attention_backward.default
    return *op(grad_out, grad_lse, *saved, ctx.scale), None, None, None


def _check_cached(
    _q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    _scale: float,
) -> None:
    op = "cached_chunk_attention"
    if any(x is not None and x.requires_grad for x in (past_k, past_v)):
        raise ValueError(f"{op}: past: expected tensors without requires_grad; the past gets no gradient")
    if k is None or v is None:
        raise ValueError(f"{op}: k, v: expected tensors where q requires grad, got none")


def _save_chunks(ctx: Any, inputs: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *result)
    ctx.mark_non_differentiable(result[1])


def _chunks_backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    op = kernels(grad_out, *saved).chunk_attention_backward.default
    return *op(grad_out, *saved, *ctx.settings), *[None] * len(ctx.settings)


def _refuse_sink(*_: Any) -> None:
    raise ValueError("renew_sink_: expected tensors without requires_grad, as a cache gets no gradient")


register_autograd("cached_chunk_attention", _save_cached, _cached_backward, _check_cached)
register_autograd("chunk_attention", _save_chunks, _chunks_backward)
register_in_place("renew_sink_", [0, 1, 2], _refuse_sink)
register_no_derivative("cached_chunk_attention_backward", "chunk_attention_backward")
