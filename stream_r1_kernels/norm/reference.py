"""Plain torch: what the ops of this folder mean."""

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated_norm_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x [B, T, D], shift and scale [B, F, D]: LN(x) * (1 + scale) + shift in float32, frame by frame."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    normed = normed.unflatten(1, (shift.shape[1], x.shape[1] // shift.shape[1]))  # [B, F, T/F, D]
    out = normed * (1 + scale.to(dtype).unsqueeze(2)) + shift.to(dtype).unsqueeze(2)
    return out.flatten(1, 2).to(x.dtype)


def gated_add_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x, y [B, T, D], gate [B, F, D]: x + y * gate in float32, frame by frame."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = y.unflatten(1, (gate.shape[1], y.shape[1] // gate.shape[1]))  # [B, F, T/F, D]
    return (x + (y.to(dtype) * gate.to(dtype).unsqueeze(2)).flatten(1, 2)).to(x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [B, T, D], weight [D]: x / rms(x) * weight, in the wider of their dtypes, in float32 inside."""
    wide = x if x.dtype == weight.dtype else x.to(torch.promote_types(x.dtype, weight.dtype))
    return F.rms_norm(wide, x.shape[-1:], weight.to(wide.dtype), eps).to(x.dtype)


def rms_norm_silu_reference(x: Tensor, weight: Tensor, before: Tensor | None, eps: float) -> Tensor:
    """x [B, T, D], weight [D], before [B, P, D]: [before | silu(x / rms(x) * weight)], in float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(dtype)
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    out = F.silu(normed * weight.to(dtype)).to(x.dtype)
    return out if before is None else torch.cat([before, out], dim=1)
