"""Figures of a set of videos, each with its spread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stream_r1.evaluation.kid import FrameFeatures, kernel_distances
from stream_r1.evaluation.reference import FRAMES, Reference, as_videos, some_frames
from stream_r1.evaluation.single import video_figures
from stream_r1.evaluation.spread import Figure
from stream_r1.rewards.base import Reward


@torch.no_grad()
def evaluate_videos(
    videos: Sequence[Tensor],
    prompts: Sequence[str],
    reference: Reference | None = None,
    judge: Reward | None = None,
) -> dict[str, Figure]:
    """Measures videos with nothing that guided a training.

    Args:
        videos: two or more, [T, 3, H, W] each, any T >= 3; floating point in [0, 1]; H, W >= 32.
        prompts: one a video.
        reference: of real videos at the same size; None: no KID.
        judge: a reward that did not guide; None: no scores.

    Returns:
        Means of `video_figures`, as far as all videos have them; "kid"; "judge/<axis>" for each axis.
    """
    videos = as_videos(videos, "evaluate_videos: videos")
    if len(videos) < 2 or len(prompts) != len(videos):
        raise ValueError(
            f"evaluate_videos: prompts: expected one for each of two videos or more, got {len(prompts)} "
            f"for {len(videos)}"
        )
    rows = [video_figures(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
    if judge is not None:
        for row, video, prompt in zip(rows, videos, prompts, strict=True):
            (scores,) = judge.score(video[None], [prompt]).tolist()
            row |= {f"judge/{axis}": score for axis, score in zip(judge.axes, scores, strict=True)}
    common = [name for name in rows[0] if all(name in row for row in rows)]
    figures = {name: Figure.mean([row[name] for row in rows]) for name in common}
    if reference is not None:
        count = min(FRAMES, *map(len, videos))
        features = FrameFeatures()(torch.cat([some_frames(video, count) for video in videos]))
        value, *without = kernel_distances(features, reference.features, count)
        figures["kid"] = Figure(value, tuple(without))
    return figures
