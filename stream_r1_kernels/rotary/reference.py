"""The meaning of the rotary ops, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of x `[B, T, H, D]` by phases `[T, D / 2]` or `[D / 2]`, in float32."""
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
