"""Shapes and dtypes of the compiled norm ops, for tracing."""

import torch
from torch import Tensor

from ..registration import register_fake


@register_fake("modulated_norm")
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


@register_fake("modulated_norm_backward")
def _(
    grad_out: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@register_fake("gated_add")
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("gated_add_backward")
def _(grad_out: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


@register_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("rms_norm_silu")
def _(x: Tensor, weight: Tensor, before: Tensor | None, eps: float) -> Tensor:
    leading = 0 if before is None else before.shape[1]
    return x.new_empty(x.shape[0], leading + x.shape[1], x.shape[2])
