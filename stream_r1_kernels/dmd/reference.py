"""Plain torch: what `dmd_loss` means."""

import torch
from torch import Tensor


def dmd_direction_reference(
    x: Tensor, fake: Tensor, real_cond: Tensor, real_uncond: Tensor | None, guidance: float
) -> Tensor:
    """g = (fake - real) / mean|x - real| per sample, 0 where not finite; float32, float64 for float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, fake, real = x.to(dtype), fake.to(dtype), real_cond.to(dtype)
    if real_uncond is not None:
        real = real + guidance * (real - real_uncond.to(dtype))
    g = (fake - real) / (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.where(g.isfinite(), g, torch.zeros_like(g))


def dmd_loss_reference(
    x: Tensor,
    fake: Tensor,
    real_cond: Tensor,
    real_uncond: Tensor | None,
    guidance: float,
    w_intra: Tensor | None,
    w_inter: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """mean_b [w_inter_b / 2 * mean_kept(w_intra_b * (x - sg(x - g))^2)], differentiable in x."""
    with torch.no_grad():
        g = dmd_direction_reference(x, fake, real_cond, real_uncond, guidance)
    # x - sg(x - g) without its rounding error: the value is g, the derivative in x is 1.
    finite_x = x.to(g.dtype).nan_to_num()
    step = g + (finite_x - finite_x.detach())
    weighted = _weights(g, w_intra, mask) * step * step
    per_sample = weighted.sum(dim=(1, 2, 3, 4)) / _kept(g, mask)
    if w_inter is not None:  # of a whole sample: a NaN is one in the gradient of what is dropped too
        per_sample = per_sample * w_inter
    return 0.5 * per_sample.sum().to(g.dtype) / max(1, x.shape[0])


def _weights(g: Tensor, w_intra: Tensor | None, mask: Tensor | None) -> Tensor:
    """w_intra where the mask keeps, 0 where it drops: a NaN there would come back in the gradient."""
    weights = torch.ones_like(g) if w_intra is None else w_intra
    return weights if mask is None else torch.where(mask, weights, torch.zeros_like(weights))


def _kept(g: Tensor, mask: Tensor | None) -> Tensor:
    """How many elements of each sample are kept, [B]; 1 for a sample that keeps none."""
    keep = torch.ones_like(g, dtype=torch.bool) if mask is None else mask.expand_as(g)
    return keep.sum(dim=(1, 2, 3, 4)).clamp(min=1).to(g.dtype)


@torch.no_grad()
def dmd_gradient_reference_(
    buffer: Tensor,
    x: Tensor,
    fake: Tensor,
    real_cond: Tensor,
    real_uncond: Tensor | None,
    guidance: float,
    w_intra: Tensor | None,
    w_inter: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> None:
    """buffer += scale * w_inter * w_intra * g / (B * kept) where the mask keeps."""
    g = dmd_direction_reference(x, fake, real_cond, real_uncond, guidance)
    per_sample = scale / max(1, x.shape[0]) / _kept(g, mask)
    if w_inter is not None:
        per_sample = per_sample * w_inter
    buffer.add_(_weights(g, w_intra, mask) * g * per_sample[:, None, None, None, None])
