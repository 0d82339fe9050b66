"""Do the fine statistics of the frames look like those of clean frames? NIQE's question.

After NIQE (Mittal, Soundararajan and Bovik, 2013): local contrast-normalised luma has a typical distribution
in clean pictures, and blur, blocks, noise and ringing each bend it. NIQE's published constants were fitted
on large photographs
and mean little for a 64 x 112 cartoon, so the clean model is fitted on the reference videos that are passed
in: the figures compare runs against one reference; they are not NIQE scores as others report them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stream_r1.pixels import check_range

_PATCH = 32  # pixels, half overlapping
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # neighbours whose products are looked at
_SHAPES = torch.arange(0.2, 10.0, 0.005, dtype=torch.float64)


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


@dataclass(frozen=True)
class CleanStatistics:
    """A Gaussian over the patch statistics of clean frames."""

    mean: Tensor  # [36] float64
    covariance: Tensor  # [36, 36] float64

    @classmethod
    def fit(cls, frames: Tensor) -> CleanStatistics:
        """frames [N, 3, H, W] in [0, 1], H and W at least 32."""
        statistics = patch_statistics(frames)
        return cls(statistics.mean(0), statistics.T.cov())

    def distance(self, frames: Tensor) -> float:
        """How far these frames' statistics are from the clean ones; 0 is the same, larger is worse.

        The distance of NIQE, eq. 10: between two Gaussians, under the mean of their covariances.
        """
        statistics = patch_statistics(frames)
        difference = statistics.mean(0) - self.mean
        pooled = (self.covariance + statistics.T.cov()) / 2
        return (
            (difference @ torch.linalg.pinv(pooled, rtol=1e-9, hermitian=True) @ difference)
            .clamp(min=0)
            .sqrt()
            .item()
        )


def patch_statistics(frames: Tensor) -> Tensor:
    """[N, 3, H, W] -> [patches of all frames, 36] float64: 18 statistics at each of two scales."""
    if frames.ndim != 4 or frames.shape[1] != 3 or min(frames.shape[2:]) < _PATCH:
        raise ValueError(
            f"patch_statistics: frames: expected [N, 3, H, W], {_PATCH} pixels a side or more, "
            f"got {list(frames.shape)}"
        )
    check_range(frames, "patch_statistics: frames", finite=True)
    full = 255 * luma(frames)
    scales = []
    for patch, picture in ((_PATCH, full), (_PATCH // 2, F.avg_pool2d(full, 2))):
        normal = _contrast_normalised(picture)  # [N, 1, h, w]
        products = [normal * torch.roll(normal, shift, (2, 3)) for shift in _SHIFTS]
        columns = [_patches(x, patch) for x in (normal, *products)]  # each [N * patches, pixels]
        fits = [_asymmetric_gaussian(x) for x in columns]
        own, others = fits[0], fits[1:]
        scales.append(
            torch.stack([own[0], (own[1] + own[2]) / 2, *(value for fit in others for value in fit)], 1)
        )
    count = min(len(scale) for scale in scales)
    return torch.cat([scale[:count] for scale in scales], 1)


def _contrast_normalised(picture: Tensor) -> Tensor:
    """(I - local mean) / (local deviation + 1), local being a 7 x 7 Gaussian window of deviation 7/6."""
    offsets = torch.arange(-3, 4, dtype=torch.float64)
    window = torch.exp(-offsets.square() / (2 * (7 / 6) ** 2))
    window = (window[:, None] * window / window.sum() ** 2).view(1, 1, 7, 7)

    def local_mean(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (3, 3, 3, 3), mode="replicate"), window)

    mean = local_mean(picture)
    variance = (local_mean(picture.square()) - mean.square()).clamp(min=0)
    return (picture - mean) / (variance.sqrt() + 1)


def _patches(x: Tensor, size: int) -> Tensor:
    """[N, 1, h, w] -> [N * patches, size * size]."""
    return F.unfold(x, size, stride=size // 2).transpose(1, 2).flatten(0, 1)


def _asymmetric_gaussian(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Moment fit of an asymmetric generalised Gaussian to each row (Lasmar et al. 2009).

    x [n, pixels] -> shape, left deviation, right deviation, mean; each [n].
    """
    tiny = 1e-8
    negative, positive = x.clamp(max=0), x.clamp(min=0)
    left = (negative.square().sum(1) / (x < 0).sum(1).clamp(min=1) + tiny).sqrt()
    right = (positive.square().sum(1) / (x > 0).sum(1).clamp(min=1) + tiny).sqrt()
    ratio = left / right
    wanted = x.abs().mean(1).square() / (x.square().mean(1) + tiny)
    wanted = wanted * (ratio**3 + 1) * (ratio + 1) / (ratio.square() + 1).square()
    # rho(shape) = gamma(2/shape)^2 / (gamma(1/shape) gamma(3/shape)) rises with the shape: look the wanted
    # value up.
    rho = torch.exp(2 * torch.lgamma(2 / _SHAPES) - torch.lgamma(1 / _SHAPES) - torch.lgamma(3 / _SHAPES))
    shape = _SHAPES[torch.searchsorted(rho, wanted).clamp(max=len(rho) - 1)]
    mean = (right - left) * torch.exp(
        torch.lgamma(2 / shape) - (torch.lgamma(1 / shape) + torch.lgamma(3 / shape)) / 2
    )
    return shape, left, right, mean
