"""What the measures need to know of the reference videos, small enough to keep instead of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from stream_r1.disk.whole import written
from stream_r1.evaluation.kid import FrameFeatures
from stream_r1.files import FileError
from stream_r1.models.tensor_files import opened, require_finite
from stream_r1.pixels import check_range

FRAMES = 4
"""Evenly spread frames of a video that measures of single frames look at."""

_WIDTH = 352


@dataclass(frozen=True)
class Reference:
    """Features of real videos' frames, [N, 352], see `FrameFeatures`."""

    features: Tensor

    @classmethod
    def fit(cls, videos: Tensor | Sequence[Tensor]) -> Reference:
        """videos: N tensors [T, 3, H, W], floating point in [0, 1], T >= 3; H, W >= 32; see `as_videos`."""
        videos = as_videos(videos, "Reference.fit: videos")
        return cls(FrameFeatures()(torch.cat([some_frames(video, FRAMES) for video in videos])))

    def save(self, path: str | Path) -> None:
        """One safetensors file, in float16."""
        with written(path) as place:
            save_file({"features": self.features.half().contiguous()}, place)

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Reads what `save` wrote; FileNotFoundError if it is not there."""
        if not Path(path).exists():
            raise FileNotFoundError(f"Reference.load: no such file: {path}")
        with opened(path, "file of statistics") as file:
            features = file.get_tensor("features")
        if features.dim() != 2 or features.shape[1] != _WIDTH or len(features) < 2:
            expected = f"[N, {_WIDTH}] with N >= 2"
            raise FileError(f"{path}: features: expected {expected}, got {list(features.shape)}")
        if not features.is_floating_point():
            raise FileError(f"{path}: features: expected floating point, got {features.dtype}")
        require_finite([("features", features)], str(path))
        return cls(features.float())


def as_videos(videos: Tensor | Sequence[Tensor], name: str) -> list[Tensor]:
    """N tensors [T, 3, H, W] on the CPU, checked under `name`: function and parameter.

    Raises:
        TypeError: not floating point.
        ValueError: none, another shape or range, fewer than 3 frames or 32 pixels a side.
    """
    group = list(videos)
    if not group:
        raise ValueError(f"{name}: expected at least one video, got none")
    for video in group:
        if not isinstance(video, Tensor) or not video.is_floating_point():
            got = video.dtype if isinstance(video, Tensor) else type(video).__name__
            raise TypeError(f"{name}: expected floating-point tensors in [0, 1], got {got}")
        if video.ndim != 4 or video.shape[1] != 3 or video.shape[0] < 3 or min(video.shape[2:]) < 32:
            raise ValueError(
                f"{name}: expected [T, 3, H, W] with T >= 3 and H, W >= 32, got {list(video.shape)}"
            )
        check_range(video, name, finite=True)
    return [video.detach().cpu() for video in group]


def some_frames(video: Tensor, count: int) -> Tensor:
    """Evenly spread frames, the first and the last among them."""
    return video[torch.linspace(0, len(video) - 1, min(count, len(video))).round().long()]
