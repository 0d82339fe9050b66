"""What the measures need to know of the reference videos, small enough to keep instead of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from stream_r1.disk.whole import written
from stream_r1.evaluation.kid import FrameFeatures
from stream_r1.evaluation.naturalness import CleanStatistics, sharpness
from stream_r1.evaluation.warp import MotionFigures, motion_figures
from stream_r1.files import FileError, parse_json
from stream_r1.messages import shown
from stream_r1.models.tensor_files import opened, require_finite
from stream_r1.pixels import check_range

_SIZES = {  # what a file holds, and how many dimensions and last entries each has
    "features": (2, 352),
    "video_features": (2, 352),
    "clean.mean": (1, 36),
    "clean.covariance": (2, 36),
    "figures": (1, 1 + len(MotionFigures._fields)),
}


@dataclass(frozen=True)
class Reference:
    """Statistics of real videos; `evaluate_videos` takes it in place of the videos."""

    features: Tensor  # [frames, 352], see FrameFeatures
    video_features: Tensor  # [videos, 352], means of a video's frames
    clean: CleanStatistics
    sharpness: float
    motion: MotionFigures  # means over the videos
    prompts: tuple[str, ...] | None  # one a video

    @classmethod
    def fit(
        cls,
        videos: Tensor | Sequence[Tensor],
        prompts: Sequence[str] | None = None,
        *,
        frames_per_video: int = 4,
    ) -> Reference:
        """videos: N tensors [T, 3, H, W], floating point in [0, 1], T >= 3; H, W >= 32; see `as_videos`."""
        videos = as_videos(videos, "Reference.fit: videos")
        if prompts is not None and len(prompts) != len(videos):
            raise ValueError(
                f"Reference.fit: prompts: expected {len(videos)}, one a video, got {len(prompts)}"
            )
        frames = [some_frames(video, frames_per_video) for video in videos]
        features = FrameFeatures()(torch.cat(frames))
        return cls(
            features,
            video_means(features, frames),
            CleanStatistics.fit(torch.cat(frames)),
            sharpness(torch.cat(frames)),
            mean_motion(videos),
            None if prompts is None else tuple(prompts),
        )

    def save(self, path: str | Path) -> None:
        """One safetensors file; features in float16."""
        tensors = {
            "features": self.features.half(),
            "video_features": self.video_features.half(),
            "clean.mean": self.clean.mean,
            "clean.covariance": self.clean.covariance,
            "figures": torch.tensor([self.sharpness, *self.motion], dtype=torch.float64),
        }
        told = {"prompts": json.dumps(self.prompts)}
        with written(path) as place:
            save_file({k: v.contiguous() for k, v in tensors.items()}, place, metadata=told)

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Reads what `save` wrote; FileNotFoundError if it is not there."""
        if not Path(path).exists():
            raise FileNotFoundError(f"Reference.load: no such file: {path}")
        with opened(path, "file of statistics") as file:
            prompts = parse_json((file.metadata() or {}).get("prompts", "null"), f"{path}: prompts")
            tensors = {name: file.get_tensor(name) for name in _SIZES}
        for name, (dims, width) in _SIZES.items():
            t = tensors[name]
            if t.dim() != dims or t.shape[-1] != width or not t.numel() or not t.is_floating_point():
                expected = f"numbers of {dims} dimensions, the last of {width}"
                raise FileError(f"{path}: {name}: expected {expected}, got {t.dtype} {list(t.shape)}")
        require_finite(tensors.items(), str(path))
        listed = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
        if prompts is not None and not (listed and len(prompts) == len(tensors["video_features"])):
            raise FileError(f"{path}: prompts: expected one a video, got {shown(prompts)}")
        sharp, *motion = tensors["figures"].tolist()
        return cls(
            tensors["features"].float(),
            tensors["video_features"].float(),
            CleanStatistics(tensors["clean.mean"], tensors["clean.covariance"]),
            sharp,
            MotionFigures(*motion),
            None if prompts is None else tuple(prompts),
        )


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


def mean_motion(videos: Sequence[Tensor]) -> MotionFigures:
    """Motion figures averaged over videos [T, 3, H, W]."""
    figures = [motion_figures(video) for video in videos]
    return MotionFigures(*(sum(values) / len(figures) for values in zip(*figures, strict=True)))


def some_frames(video: Tensor, count: int) -> Tensor:
    """Evenly spread frames, the first and the last among them."""
    return video[torch.linspace(0, len(video) - 1, min(count, len(video))).round().long()]


def video_means(features: Tensor, frames: Sequence[Tensor]) -> Tensor:
    """[all frames, d] -> [videos, d]."""
    return torch.stack([part.mean(0) for part in features.split([len(group) for group in frames])])
