"""Shapes and dtypes of the compiled ops, for tracing."""

import torch
from torch import Tensor

from ..registration import register_fake
from .rows import FP8


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    data = x.new_empty(x.shape, dtype=FP8)
    return data, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@register_fake("quantize_rows")
def _(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return _rows(x)


@register_fake("modulated_norm_fp8")
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _rows(x)
