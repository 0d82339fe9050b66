"""All measures of a set of generated videos in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stream_r1.evaluation.kid import FrameFeatures, kernel_distance, prompt_match
from stream_r1.evaluation.naturalness import sharpness
from stream_r1.evaluation.reference import Reference, as_videos, mean_motion, some_frames, video_means


class Measure(NamedTuple):
    """What a figure of `evaluate_videos` means."""

    better: Literal["lower", "higher", "near reference"]
    meaning: str


MEASURES: dict[str, Measure] = {
    "kid": Measure(
        "lower", "distance of the frames' contents from the reference's (KID, EfficientNet-lite2); 0 is equal"
    ),
    "naturalness": Measure(
        "lower", "distance of fine picture statistics from the reference's (after NIQE); 0 is equal"
    ),
    "sharpness": Measure(
        "near reference", "mean Laplacian of luma over that of the reference; below 1 is blurred"
    ),
    "warp_error": Measure(
        "lower", "difference of neighbouring frames after motion compensation, grey levels of 255"
    ),
    "motion": Measure("near reference", "mean optical flow, pixels a frame; near 0 is a still picture"),
    "judder": Measure(
        "near reference", "unsteadiness of the change from frame to frame; freezing and jumps raise it"
    ),
    "prompt_match": Measure(
        "higher", "share of reference pairs where the video's own prompt's is the nearer; 0.5 by chance"
    ),
}


def evaluate_videos(
    videos: Tensor | Sequence[Tensor],
    reference: Reference | Tensor | Sequence[Tensor],
    prompts: Sequence[str] | None = None,
    reference_prompts: Sequence[str] | None = None,
    *,
    frames_per_video: int = 4,
) -> dict[str, float]:
    """Measures generated videos against reference videos, with nothing that the reward has learnt.

    Args:
        videos: [N, T, 3, H, W], or N tensors [T, 3, H, W] of any lengths >= 3; floating point in [0, 1]; H,
            W >= 32.
        reference: likewise; real ones, at the same size as the videos. Or what `Reference.fit` kept of them.
        prompts, reference_prompts: the videos' captions (a `Reference` has its own); `prompt_match` is in the
            result when both are there and some prompt occurs in both.
        frames_per_video: evenly spread frames a video that KID, naturalness and sharpness look at.

    Returns:
        The figures of `MEASURES`, which says what each means and which way is better; those of single videos
        averaged. With `sharpness` relative to the reference; `motion_reference`, `warp_error_reference` and
        `judder_reference` say what the reference itself has.
    """
    videos = as_videos(videos, "evaluate_videos: videos")
    if not isinstance(reference, Reference):
        clips = as_videos(reference, "evaluate_videos: reference")
        reference = Reference.fit(clips, reference_prompts, frames_per_video=frames_per_video)
    frames = [some_frames(video, frames_per_video) for video in videos]
    features = FrameFeatures()(torch.cat(frames))
    result = {
        "kid": kernel_distance(features, reference.features),
        "naturalness": reference.clean.distance(torch.cat(frames)),
        "sharpness": sharpness(torch.cat(frames)) / max(reference.sharpness, 1e-6),
    }
    for suffix, figures in (("", mean_motion(videos)), ("_reference", reference.motion)):
        result |= {name + suffix: value for name, value in figures._asdict().items()}
    if prompts is not None and reference.prompts is not None:
        means = video_means(features, frames)
        match = prompt_match(means, prompts, reference.video_features, reference.prompts)
        if match is not None:
            result["prompt_match"] = match
    return result
