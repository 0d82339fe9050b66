"""How sharp pictures are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stream_r1.pixels import check_range


def luma(frames: Tensor) -> Tensor:
    """[N, 3, H, W] in [0, 1] -> [N, 1, H, W] float64 (BT.601 weights)."""
    check_range(frames, "luma: frames", finite=True)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=frames.device).view(3, 1, 1)
    return (frames.double() * weights).sum(1, keepdim=True)


def sharpness(frames: Tensor) -> float:
    """Mean magnitude of luma's Laplacian, in grey levels (0 to 255). Noise raises it too."""
    check_range(frames, "sharpness: frames", finite=True)
    kernel = torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64).view(1, 1, 3, 3)
    return F.conv2d(255 * luma(frames), kernel).abs().mean().item()
