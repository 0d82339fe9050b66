"""Shapes and dtypes of the compiled DMD ops, for tracing."""

import torch
from torch import Tensor

from ..registration import register_fake


@register_fake("dmd_loss")
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    factor = x.new_empty(x.shape[:1], dtype=torch.float32)
    return factor.new_empty(()), x.new_empty(x.shape), factor


@register_fake("dmd_loss_backward")
def _(grad_loss: Tensor, direction: Tensor, factor: Tensor) -> Tensor:
    return direction.new_empty(direction.shape)


@register_fake("dmd_gradient_")
def _(*_: object) -> None:
    return None
