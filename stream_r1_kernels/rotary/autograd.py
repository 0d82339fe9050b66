"""Gradients of the compiled rotary ops."""

from typing import Any

from torch import Tensor

from ..registration import kernels, register_autograd, register_in_place, register_no_derivative


def _save(ctx: Any, inputs: tuple[Any, ...], _result: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.num_heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    op = kernels(grad_q, grad_k, *saved).qk_norm_rotary_backward.default
    return *op(grad_q, grad_k, *saved, ctx.num_heads, ctx.eps), None, None, None, None


def _refuse(*_: Any) -> None:
    raise ValueError(
        "qk_norm_rotary: k_out: expected tensors without requires_grad beside it, as keys in a buffer carry "
        "no gradient"
    )


register_autograd("qk_norm_rotary", _save, _backward)
register_in_place("qk_norm_rotary_into", [8], _refuse)
register_no_derivative("qk_norm_rotary_backward")
