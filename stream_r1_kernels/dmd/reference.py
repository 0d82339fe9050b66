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
    squares = (g + (finite_x - finite_x.detach())) ** 2
    if w_intra is not None:
        # what is dropped has no weight: a NaN there would come back in the gradient
        squares = squares * (
            w_intra if mask is None else torch.where(mask, w_intra, torch.zeros_like(w_intra))
        )
    per_sample = _mean_kept(squares, mask)
    if w_inter is not None:
        per_sample = per_sample * w_inter
    return 0.5 * per_sample.sum().to(g.dtype) / max(1, x.shape[0])


def _mean_kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of each sample's kept elements, [B]; 0 for a sample that keeps none."""
    dims = (1, 2, 3, 4)
    if mask is None:
        return values.mean(dim=dims)
    keep = mask.expand_as(values)
    kept = torch.where(keep, values, torch.zeros_like(values))
    return kept.sum(dim=dims) / keep.sum(dim=dims).clamp(min=1)


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
    if w_intra is not None:
        g = g * w_intra
    per_sample = torch.full(x.shape[:1], scale / max(1, x.shape[0]), dtype=g.dtype, device=g.device)
    if w_inter is not None:
        per_sample = per_sample * w_inter
    if mask is None:
        per_sample = per_sample / x[0:1].numel()
    else:
        keep = mask.expand_as(g)
        g = torch.where(keep, g, torch.zeros_like(g))
        per_sample = per_sample / keep.sum(dim=(1, 2, 3, 4)).clamp(min=1)
    buffer.add_(g * per_sample[:, None, None, None, None])
