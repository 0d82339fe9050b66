"""Gradients of the compiled norm ops."""

from typing import Any

from torch import Tensor

from ..registration import kernels, register_autograd, register_no_derivative


def _save_norm(ctx: Any, inputs: tuple[Any, ...], result: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _shift, scale, _eps = inputs
    _out, mean, rstd = result
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _norm_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    return *kernels(grad, *saved).modulated_norm_backward.default(grad, *saved), None


def _save_gated(ctx: Any, inputs: tuple[Tensor, ...], _result: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    saved = ctx.saved_tensors
    return grad, *kernels(grad, *saved).gated_add_backward.default(grad, *saved)


def _save_silu(ctx: Any, inputs: tuple[Any, ...], _result: Tensor) -> None:
    x, weight, before, ctx.eps = inputs
    ctx.save_for_backward(x, weight)
    ctx.leading = 0 if before is None else before.shape[1]


def _silu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """In torch's ops, in float32: autoencoders stream without gradients.

    With n = x * rstd, y = n * weight and g the gradient by y: grad_x = rstd * (u - n * mean(u * n)),
    u = g * weight.
    """
    x, weight = ctx.saved_tensors
    wide, factor = x.float(), weight.float()
    rstd = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
    n = wide * rstd
    y = n * factor
    s = y.sigmoid()
    g = grad[:, ctx.leading :].float() * (s * (1 + y * (1 - s)))
    u = g * factor
    wanted = ctx.needs_input_grad
    return (
        (rstd * (u - n * (u * n).mean(-1, keepdim=True))).to(x.dtype) if wanted[0] else None,
        (g * n).sum((0, 1)).to(weight.dtype) if wanted[1] else None,
        grad[:, : ctx.leading] if wanted[2] else None,
        None,
    )


register_autograd("modulated_norm", _save_norm, _norm_backward)
register_autograd("gated_add", _save_gated, _gated_backward)
register_autograd("rms_norm_silu", _save_silu, _silu_backward)
register_no_derivative("modulated_norm_backward", "gated_add_backward", "rms_norm")
