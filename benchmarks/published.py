"""Two formulations as public code of Wan 2.1, Self Forcing and DMD2 runs them: baselines, not references."""

from __future__ import annotations

import torch
from torch import Tensor


def phase_table(head_dim: int, positions: int = 1024, theta: float = 10000.0) -> tuple[Tensor, ...]:
    """exp(i p theta^(-2 j / axis)), complex128 [positions, axis / 2], for the frame, row and column axes."""
    spatial = 2 * (head_dim // 6)
    axes = (head_dim - 2 * spatial, spatial, spatial)
    p = torch.arange(positions, dtype=torch.float64)
    frequencies = [theta ** -(torch.arange(0, axis, 2, dtype=torch.float64) / axis) for axis in axes]
    return tuple(
        torch.polar(torch.ones(positions, f.numel(), dtype=torch.float64), torch.outer(p, f))
        for f in frequencies
    )


def norm_rotary(
    x: Tensor, weight: Tensor, tables: tuple[Tensor, ...], grid: tuple[int, int, int], heads: int, eps: float
) -> Tensor:
    """[B, T, H * D] -> [B, T, H, D]: RMSNorm in float32, then complex128 rotation, sample by sample."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight
    frames, rows, columns = grid
    rotated = []
    for sample in normed.unflatten(-1, (heads, -1)):  # [T, H, D]
        phases = torch.cat(
            [
                tables[0][:frames, None, None].expand(frames, rows, columns, -1),
                tables[1][None, :rows, None].expand(frames, rows, columns, -1),
                tables[2][None, None, :columns].expand(frames, rows, columns, -1),
            ],
            -1,
        ).reshape(sample.shape[0], 1, -1)  # [T, 1, D / 2]
        pairs = torch.view_as_complex(sample.to(torch.float64).unflatten(-1, (-1, 2)))
        rotated.append(torch.view_as_real(pairs * phases).flatten(2))
    return torch.stack(rotated).type_as(x)


def dmd_loss(x: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, guidance: float = 3.0) -> Tensor:
    """0.5 mean (x - sg(x - g))^2 in float64, with g = (fake - real) / mean |x - real|."""
    with torch.no_grad():
        real = cond + guidance * (cond - uncond)
        normaliser = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        g = torch.nan_to_num((fake - real) / normaliser)
    return 0.5 * torch.nn.functional.mse_loss(x.double(), (x.double() - g.double()).detach())
