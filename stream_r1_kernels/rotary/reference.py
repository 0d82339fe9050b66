"""The meaning of the rotary ops, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_float_tensor, check_tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of x `[B, T, H, D]` by phases `[T, D / 2]` or `[D / 2]`.

    In float32 (float64 for float64), rounded once to x's dtype.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: not a floating-point dtype.
    """
    check_float_tensor("apply_rotary", "x", x)
    if x.dim() != 4 or x.shape[3] % 2:
        raise ValueError(f"apply_rotary: x: expected [B, T, H, D] with an even D, got shape {tuple(x.shape)}")
    tokens, pairs = x.shape[1], x.shape[3] // 2
    for name, phase in (("cos", cos), ("sin", sin)):
        check_tensor("apply_rotary", name, phase)
        if phase.shape not in ((tokens, pairs), (pairs,)) or phase.dim() != cos.dim():
            raise ValueError(
                f"apply_rotary: {name}: expected shape {(tokens, pairs)} or {(pairs,)}, the same of both, "
                f"got {tuple(phase.shape)}"
            )
    exact = torch.promote_types(x.dtype, torch.float32)
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]  # [T, 1, D / 2]
    even, odd = x.to(exact).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def norm_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, eps: float) -> Tensor:
    """RMSNorm over the full width, head split, rotary: `[B, T, H * D] -> [B, T, H, D]`."""
    exact = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(exact)
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(exact)
    return apply_rotary(normed.unflatten(-1, (num_heads, -1)), cos, sin).to(x.dtype)
