"""Plain torch: what `region_saliency` and `intra_weights` mean."""

import torch
from torch import Tensor

# A profile or a map whose range is below this fraction of its largest value is constant: min-max would blow
# rounding noise up to the full range.
FLAT_RANGE = 1e-6


def region_saliency_reference(pixel_grads: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    """pixel_grads [..., T, C, H, W] -> [..., frames, rows, columns]; float32, float64 for float64."""
    *lead, pixel_frames, _, height, width = pixel_grads.shape
    if pixel_grads.dtype != torch.float64:
        pixel_grads = pixel_grads.float()
    # Scaled, so that no square leaves the range; many times faster than vector_norm here.
    largest = pixel_grads.abs().amax(-3, keepdim=True)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    norm = (pixel_grads / unit).square().sum(-3).sqrt() * unit.squeeze(-3)  # [..., T, H, W]
    tiles = norm.reshape(*lead, pixel_frames, rows, height // rows, columns, width // columns)
    cells = tiles.mean(dim=(-3, -1))  # [..., T, rows, columns]
    first = cells[..., :1, :, :]  # the causal VAE codes pixel frame 0 alone
    if frames == 1:
        return first
    factor = (pixel_frames - 1) // (frames - 1)
    later = cells[..., 1:, :, :].reshape(*lead, frames - 1, factor, rows, columns).mean(dim=-3)
    return torch.cat([first, later], dim=-3)


def _profile(values: Tensor, dim: tuple[int, ...], strength: float, floor: float) -> Tensor:
    """Min-max over `dim`, blended with 1, clamped from below, of mean 1; ones where `values` is constant."""
    low, high = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    flat = high - low <= FLAT_RANGE * high.abs()
    span = torch.where(flat, torch.ones_like(high), high - low)
    profile = ((1 - strength) + strength * (values - low) / span).clamp(min=floor)
    return torch.where(flat, torch.ones_like(profile), profile / profile.mean(dim, keepdim=True))


def intra_weights_reference(
    saliency: Tensor,
    scores: Tensor,
    temperature: float,
    spatial_floor: float,
    temporal_floor: float,
    spatial_strength: float,
    temporal_strength: float,
    use_spatial: bool,
    use_temporal: bool,
) -> Tensor:
    """saliency [M, B, F, h, w], scores [B, M] -> [B, F, 1, h, w]; float32, float64 for float64."""
    dtype = torch.float64 if saliency.dtype == torch.float64 else torch.float32
    above = scores.to(dtype) - scores.to(dtype).amin(1, keepdim=True)
    share = torch.softmax(-above / temperature, dim=1)  # [B, M], a weaker axis gets more
    fused = torch.einsum("bm,mbfhw->bfhw", share, saliency.to(dtype))
    weights = torch.ones_like(fused)
    if use_temporal:
        frames = fused.mean((2, 3), keepdim=True)  # [B, F, 1, 1]
        weights = weights * _profile(frames, (1,), temporal_strength, temporal_floor)
    if use_spatial:
        weights = weights * _profile(fused, (2, 3), spatial_strength, spatial_floor)
    weights = weights / weights.mean((1, 2, 3), keepdim=True)
    finite = fused.isfinite().all(dim=3).all(dim=2).all(dim=1)[:, None, None, None]
    return torch.where(finite, weights, torch.full_like(weights, torch.nan)).unsqueeze(2)
