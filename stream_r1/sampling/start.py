"""What a stream goes on from: the end of a video, or a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.sampling.video import is_image, read_image, read_video


@dataclass(frozen=True)
class Start:
    """Frames for `first_frames`, [1, T, 3, H, W], and in words where they are from."""

    frames: Tensor
    meaning: str


def read_start(path: str | Path, pipeline: StreamR1Pipeline) -> Start:
    """First frames for a pipeline, from a file.

    Of a video its last frames, as many as fill whole chunks of the student's window. A picture is the first
    frame of a student with an independent first frame; others start with a whole chunk, for which it stands
    still.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video or a picture, another size than the pipeline's, or too few frames.
    """
    path = Path(path)
    picture = is_image(path)
    video = read_image(path)[None] if picture else read_video(path)[0]  # [T, 3, H, W]
    if tuple(video.shape[-2:]) != pipeline.size:
        expected, got = (f"{height}x{width}" for height, width in (pipeline.size, video.shape[-2:]))
        raise ValueError(f"{path}: expected {expected} pixels (height x width) to start from, got {got}")
    config, frames = pipeline.student.config, pipeline.vae.frames
    each, count = config["frames_per_chunk"], config["first_chunk_frames"] or config["frames_per_chunk"]
    if picture:
        needed = frames(count)
        meaning = "a picture as the first frame" if needed == 1 else f"a picture, still for {needed} frames"
        return Start(video.expand(needed, -1, -1, -1)[None], meaning)
    limit = config["window_frames"] or math.inf
    while count + each <= limit and frames(count + each) <= len(video):
        count += each
    if frames(count) > len(video):
        raise ValueError(f"{path}: expected at least {frames(count)} frames to start from, got {len(video)}")
    return Start(video[-frames(count) :][None], f"the last {frames(count)} of {len(video)} frames")
