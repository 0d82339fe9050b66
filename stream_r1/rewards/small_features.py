"""What the small reward sees of a video: per-frame appearance, statistics of change, and content.

Everything is differentiable in the pixels and made of one pass of a frozen network over the frames.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_r1.rewards.efficientnet import EfficientNetLite

SIZE = (64, 112)  # height, width that the heads are trained at
NETWORKS = {"lite0": (0, 2, 4, 10, 15), "lite2": (0, 3, 6, 14, 20)}
"""What it may look through: an EfficientNet's name and the blocks after which it is read: at 1/2, 1/4, 1/8,
1/16 and 1/32 of the pixels a side.
"""
_EPS = 0.02  # change below this (features: O(1), pixels: x 10) counts as none
_FRAMES_AT_ONCE = (
    32  # keeps every buffer below 32 MiB, which glibc gives again instead of mapping fresh pages
)
_GRID = 8  # pixels of the block grid that decoders and codecs leave visible


class Features(NamedTuple):
    """Features of a batch of videos; float32. How many numbers each has: `FeatureExtractor.sizes`."""

    appearance: Tensor  # [B, T, a] for VQ
    motion: Tensor  # [B, m] for MQ
    content: Tensor  # [B, c] for TA


class FeatureExtractor(nn.Module):
    """[B, T, 3, H, W] in [0, 1], any T and size -> Features. Frozen, without state of its own to save.

    Args:
        network: a key of `NETWORKS`.

    sizes: numbers in appearance (of a frame), motion and content.
    """

    def __init__(self, network: str = "lite0"):
        super().__init__()
        self.network = network
        self.trunk = EfficientNetLite.from_package(network, NETWORKS[network])
        c = self.trunk.channels
        moments = 2 * sum(c[:4])
        self.sizes = (moments + 8, 5 * (3 + c[1] + c[2]), moments + c[4] + 12)

    def forward(self, video: Tensor) -> Features:
        batch, frames = video.shape[:2]
        images = video.flatten(0, 1).float()  # [B*T, 3, H, W]
        if images.shape[-2:] != SIZE:
            images = F.interpolate(images, SIZE, mode="bilinear", antialias=True, align_corners=False)
        parts = [self.trunk(part) for part in images.split(_FRAMES_AT_ONCE)]
        maps = [torch.cat(tap) for tap in zip(*parts, strict=True)]
        moments = torch.cat([*map(_pooled_moments, maps[:4])], 1)
        appearance = torch.cat([moments, _pixel_statistics(images)], 1)
        content = torch.cat([moments, maps[4].mean((2, 3))], 1)
        thumbnails = 10 * F.avg_pool2d(images, 4)  # [B*T, 3, 16, 28]
        moving = [x.unflatten(0, (batch, frames)) for x in (thumbnails, maps[1], maps[2])]
        return Features(
            appearance.unflatten(0, (batch, frames)),
            torch.cat([_change_statistics(x) for x in moving], 1),
            torch.cat([content.unflatten(0, (batch, frames)).mean(1), _directions(moving[0])], 1),
        )


def _pooled_moments(x: Tensor) -> Tensor:
    """[N, C, h, w] -> mean and standard deviation over space, [N, 2C]."""
    mean = x.mean((2, 3))
    variance = (x - mean[..., None, None]).square().mean((2, 3))
    return torch.cat([mean, (variance + 1e-6).sqrt()], 1)


def _pixel_statistics(images: Tensor) -> Tensor:
    """Log energies of luma's fine detail at two scales and of the seams of an 8 x 8 grid, [N, 8]."""
    luma = images.mean(1, keepdim=True)  # [N, 1, H, W]
    statistics = []
    for scale in (1, 2):
        x = F.avg_pool2d(luma, scale) if scale > 1 else luma
        dx, dy = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
        corner = (
            dx[..., 1:, 1:] - dx[..., 1:, :-1] - dx[..., :-1, 1:] + dx[..., :-1, :-1]
        )  # noise more than edges
        statistics += [_log_energy(dx), _log_energy(dy), _log_energy(corner)]
        if scale == 1:
            seams_x, seams_y = dx[..., _GRID - 1 :: _GRID], dy[..., _GRID - 1 :: _GRID, :]
            statistics += [_log_energy(seams_x) - statistics[0], _log_energy(seams_y) - statistics[1]]
    return torch.cat(statistics, 1)


def _log_energy(x: Tensor) -> Tensor:
    """[N, 1, h, w] -> log of the mean magnitude, [N, 1]."""
    return (x.abs().mean((2, 3)) + 1e-3).log()


def _change_statistics(x: Tensor) -> Tensor:
    """How a map changes: [B, T, C, h, w] -> [B, 5C].

    Smooth motion has second differences small beside first ones, changes over two frames larger than over
    one, and a steady amount of change; freezing, jitter, flicker and shuffling each break one of these.
    """
    if x.shape[1] < 3:  # too short for a second difference: the last frame stands still
        x = torch.cat([x, *[x[:, -1:]] * (3 - x.shape[1])], 1)
    first = x[:, 1:] - x[:, :-1]
    second = first[:, 1:] - first[:, :-1]
    step = _log_change(first)  # [B, T-1, C]
    around = (step[:, 1:] + step[:, :-1]) / 2
    roughness = _log_change(second) - around
    progress = _log_change(first[:, 1:] + first[:, :-1]) - around
    return torch.cat(
        [step.mean(1), _deviation(step), roughness.mean(1), _deviation(roughness), progress.mean(1)], 1
    )


def _directions(x: Tensor) -> Tensor:
    """Which way things move: [B, T, 3, h, w] -> [B, 12].

    Mean and deviation over time of each channel's motion sideways and down.

    The motion is the least-squares one of the whole picture (Lucas and Kanade, 1981), pixels of x a frame.
    """
    if x.shape[1] < 2:
        return x.new_zeros(len(x), 12)
    middle, change = (x[:, 1:] + x[:, :-1]) / 2, x[:, 1:] - x[:, :-1]
    motions = []
    for axis in (4, 3):
        slope = (middle.roll(-1, axis) - middle.roll(1, axis)).narrow(axis, 1, x.shape[axis] - 2) / 2
        changed = change.narrow(axis, 1, x.shape[axis] - 2)
        motions.append(-(changed * slope).sum((3, 4)) / (slope.square().sum((3, 4)) + 1))
    motion = torch.cat(motions, 2)  # [B, T-1, 6]
    return torch.cat([motion.mean(1), _deviation(motion)], 1)


def _log_change(x: Tensor) -> Tensor:
    """[B, t, C, h, w] -> log of the mean magnitude over space, [B, t, C]."""
    return (x.abs().mean((3, 4)) + _EPS).log()


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation over time, with a finite gradient at zero: [B, t, C] -> [B, C]."""
    return ((x - x.mean(1, keepdim=True)).square().mean(1) + 1e-6).sqrt()
