"""Figures of one video each, so that sets of videos can be compared pair by pair."""

from __future__ import annotations

from torch import Tensor

from stream_r1.drawn_world import HEIGHT, WIDTH, Scene
from stream_r1.drawn_world.measures import MEASURES as EXACT
from stream_r1.drawn_world.measures import measure
from stream_r1.evaluation.reference import FRAMES, as_videos, some_frames
from stream_r1.evaluation.report import Measure
from stream_r1.evaluation.sharpness import sharpness
from stream_r1.evaluation.warp import motion_figures
from stream_r1.pixels import chroma

FIGURES: dict[str, Measure] = {
    **{name: Measure("higher", meaning) for name, meaning in EXACT.items()},
    "sharpness": Measure("near reference", "mean Laplacian of luma; lower is blurred"),
    "saturation": Measure("near reference", "mean of (largest - smallest of red, green, blue)"),
    "motion": Measure("near reference", "mean optical flow, pixels a frame; near 0 is a still picture"),
    "warp_error": Measure(
        "lower", "difference of neighbouring frames after motion compensation, grey levels of 255"
    ),
    "judder": Measure(
        "near reference", "unsteadiness of the change from frame to frame; freezing and jumps raise it"
    ),
}
"""Name of a figure: what it means. The exact ones are those of the drawn world."""


def video_figures(video: Tensor, prompt: str) -> dict[str, float]:
    """The figures of `FIGURES` for one video.

    Args:
        video: [T, 3, H, W], floating point in [0, 1], T >= 3, H and W >= 32.
        prompt: its text. The exact figures are there for a prompt of the drawn world and a video of its size.
    """
    (video,) = as_videos([video], "video_figures: video")
    motion = motion_figures(video)
    figures = {
        "sharpness": sharpness(some_frames(video, FRAMES)),
        "saturation": float(chroma(video.float()).mean()),
        "motion": motion.motion,
        "warp_error": motion.warp_error,
        "judder": motion.judder,
    }
    if video.shape[2:] == (HEIGHT, WIDTH) and len(video) >= 8 and Scene.has(prompt):
        return measure(video, Scene.of(prompt)) | figures
    return figures
