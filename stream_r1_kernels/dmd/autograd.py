"""Gradients of the compiled DMD ops."""

from typing import Any

import torch
from torch import Tensor

from ..registration import kernels, register_autograd, register_in_place, register_no_derivative

_NAMES = ("x", "fake", "real_cond", "real_uncond", "guidance", "w_intra", "w_inter", "mask")


class _Refusing(torch.autograd.Function):
    """The gradient as a tensor that depends on x, with a derivative by it that raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, grad: Tensor) -> Tensor:
        return grad.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(
            "dmd_loss: the derivative of its gradient is not implemented; backend='reference' has it"
        )

    jvp = backward


def _save(ctx: Any, inputs: tuple[Any, ...], result: tuple[Tensor, Tensor, Tensor]) -> None:
    _loss, direction, factor = result
    ctx.x = inputs[0]  # for what it depends on; its values are not read
    ctx.save_for_backward(direction, factor)
    ctx.mark_non_differentiable(direction, factor)


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad = kernels(grad_loss, *saved).dmd_loss_backward.default(grad_loss, *saved)
    if torch.is_grad_enabled():  # direction and factor count as constants, and are none
        grad = _Refusing.apply(ctx.x, grad)
    return grad, *[None] * (len(_NAMES) - 1)


def _only_x(*inputs: Any) -> None:
    for name, value in zip(_NAMES[1:], inputs[1:], strict=True):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"dmd_loss: {name}: only x has a gradient; pass {name}.detach()")


def _constant_for_autograd(*inputs: Any) -> None:
    if inputs[0].requires_grad:
        raise ValueError(
            "dmd_gradient_: buffer: expected a tensor that does not require grad, got one that does"
        )


register_autograd("dmd_loss", _save, _backward, _only_x)
register_in_place("dmd_gradient_", [0], _constant_for_autograd)
register_no_derivative("dmd_loss_backward")
