"""Plain torch: what the ops of this folder mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..norm.reference import modulated_norm_reference
from .rows import FP8, LARGEST, LEAST, QuantizedRows


def quantize_rows_reference(x: Tensor, gelu: bool = False) -> QuantizedRows:
    """x [..., K], or its GELU (tanh approximation), in float32: to nearest, ties to even, by the row's
    largest magnitude. A row with a NaN or an infinity is NaN or without a finite scale.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if gelu:
        wide = functional.gelu(wide, approximate="tanh")
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    factor = torch.full_like(largest, LARGEST) / largest  # of a number torch takes the reciprocal first
    # Clamped: the factor is rounded, and past 464 the cast gives NaN.
    data = (wide * factor).clamp(-LARGEST, LARGEST).to(FP8)
    return QuantizedRows(data, (largest / LARGEST).float())


def modulated_norm_fp8_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> QuantizedRows:
    """x [B, T, D], shift and scale [B, F, D]: LN(x) * (1 + scale) + shift, not rounded in between."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return quantize_rows_reference(modulated_norm_reference(wide, shift, scale, eps))
