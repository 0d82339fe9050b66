"""How sharp pictures are."""

from __future__ import annotations

from torch import Tensor

from stream_r1.pixels import check_range, laplacian, luma


def sharpness(frames: Tensor) -> float:
    """Mean magnitude of luma's Laplacian, in grey levels (0 to 255). Noise raises it too.

    Args:
        frames: [N, 3, H, W] in [0, 1].
    """
    check_range(frames, "sharpness: frames", finite=True)
    return laplacian(255 * luma(frames.double())).abs().mean().item()
