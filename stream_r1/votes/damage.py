"""The damaged copies of attention checks: nobody who looks can prefer one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from stream_r1.disk.whole import written
from stream_r1.sampling.video import VideoWriter
from stream_r1.sampling.video_file import VideoFile

CELLS = 10  # of the mosaic, across the shorter side
HELD = 8  # frames that each picture stands still


def damaged(video: Tensor) -> Tensor:
    """A coarse, grey, jerking mosaic of a video [T, 3, H, W] in [0, 1]."""
    held = video[torch.arange(len(video)) // HELD * HELD]
    height, width = video.shape[2:]
    scale = CELLS / min(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    coarse = functional.interpolate(held, size, mode="area")
    grey = coarse.mean(1, keepdim=True).expand_as(coarse)
    return functional.interpolate(0.3 * coarse + 0.7 * grey, (height, width), mode="nearest")


def write_damaged(source: Path, target: Path) -> None:
    """A damaged copy of a video file, frame for frame as long."""
    with VideoFile(source) as file:
        footage = file.read()
    with written(target) as place, VideoWriter(place, footage.fps) as writer:
        writer.write(damaged(footage.frames))
