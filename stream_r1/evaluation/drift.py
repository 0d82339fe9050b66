"""How a long stream changes: colour, saturation, sharpness, motion, jumps at chunk borders and the match with
its prompt, window by window. Memory is that of one window, however long the video is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stream_r1.drawn_world import HEIGHT, WIDTH, Scene
from stream_r1.drawn_world.measures import measure
from stream_r1.evaluation.reference import some_frames
from stream_r1.evaluation.report import Measure
from stream_r1.evaluation.sharpness import sharpness
from stream_r1.evaluation.warp import motion_figures
from stream_r1.pixels import chroma
from stream_r1.rewards.base import Reward
from stream_r1.sampling.video_file import VideoFile

CURVES: dict[str, Measure] = {
    "saturation": Measure("near reference", "mean of (largest - smallest of red, green, blue)"),
    "lightness": Measure("near reference", "mean L of CIE Lab, 0 to 100"),
    "green-red": Measure("near reference", "mean a of CIE Lab: below 0 green, above it red"),
    "blue-yellow": Measure("near reference", "mean b of CIE Lab: below 0 blue, above it yellow"),
    "sharpness": Measure("near reference", "mean Laplacian of luma, grey levels; lower is blurred"),
    "motion": Measure("near reference", "mean optical flow, pixels a frame; near 0 is a still picture"),
    "jump": Measure(
        "near reference",
        "change of the picture across chunk borders over that from frame to frame; 1 shows no border",
    ),
    "match": Measure("higher", "match with the prompt"),
}
"""Name of a curve: what it means."""

_FRAMES = 4  # of a window, evenly spread, for colour and sharpness
_PLACES = 2  # in a window, at which three frames tell the motion
_FLOOR = 0.25  # grey level: below it a difference is none

Match = Callable[[Tensor, str], float]
"""How well frames [T, 3, H, W] fit a prompt."""


def drift_curves(
    path: Path, borders: Sequence[int], prompt: str, *, window: float, match: Match | None = None
) -> dict[str, list[float]]:
    """The curves of `CURVES` of one video file, a number a window; nan where a window has none.

    Args:
        path: the video, of at least three frames.
        borders: frames that chunks begin with, the first one left out.
        window: seconds. A rest of less than half of that belongs to no window.
        match: None: no curve "match", but for prompts of the drawn world, where it is exact.
    """
    rows: list[dict[str, float]] = []
    changes: list[NDArray[np.float64]] = []  # mean difference of each frame from the one before
    with VideoFile(path) as file:
        length = max(3, round(window * float(file.fps)))
        last: Tensor | None = None
        for frames in file.pieces(length):
            before = frames[:1] if last is None else last
            changes.append(_changes(torch.cat([before, frames])))
            last = frames[-1:].clone()
            if 2 * len(frames) >= length and len(frames) >= 3:
                rows.append(_measured(frames, prompt, match))
    if not rows:
        raise ValueError(
            f"drift_curves: path: expected at least {(length + 1) // 2} frames, got fewer in {path}"
        )
    curves = {name: [row[name] for row in rows] for name in rows[0]}
    jumps = border_jumps(np.concatenate(changes), borders)
    curves["jump"] = [
        float(np.mean(inside)) if inside else float("nan")
        for inside in (
            [jump for frame, jump in jumps.items() if n * length <= frame < (n + 1) * length]
            for n in range(len(rows))
        )
    ]
    return {name: curves[name] for name in CURVES if name in curves}


def border_jumps(changes: NDArray[np.float64], borders: Sequence[int]) -> dict[int, float]:
    """By border: the change across it over the mean change inside of the two chunks that meet there.

    Args:
        changes: [T] mean absolute difference of each frame from the one before, grey levels; the first is 0.
        borders: frames that chunks begin with, ascending, the first one left out.
    """
    begins = [0, *borders, len(changes)]
    jumps = {}
    for k, border in enumerate(borders, start=1):
        inside = np.concatenate([changes[begins[k - 1] + 1 : border], changes[border + 1 : begins[k + 1]]])
        if len(inside):
            jumps[border] = float((changes[border] + _FLOOR) / (inside.mean() + _FLOOR))
    return jumps


def changes_over(curve: Sequence[float]) -> float:
    """How much a curve changes: the mean of its last tenth less that of its first, each a window at least."""
    values = np.array([value for value in curve if np.isfinite(value)])
    if len(values) < 2:
        return float("nan")
    part = max(1, len(values) // 10)
    return float(values[-part:].mean() - values[:part].mean())


def reward_match(reward: Reward) -> Match:
    """By the axis TA of a reward, else by its last axis."""
    axis = reward.axes.index("TA") if "TA" in reward.axes else len(reward.axes) - 1

    @torch.no_grad()
    def match(frames: Tensor, prompt: str) -> float:
        return float(reward.score(frames[None], [prompt])[0, axis])

    return match


def _measured(frames: Tensor, prompt: str, match: Match | None) -> dict[str, float]:
    some = some_frames(frames, _FRAMES)
    lightness, green_red, blue_yellow = _lab(some)
    places = torch.linspace(0, len(frames) - 3, min(_PLACES, len(frames) - 2)).round().long().tolist()
    figures = {
        "saturation": float(chroma(some.float()).mean()),
        "lightness": lightness,
        "green-red": green_red,
        "blue-yellow": blue_yellow,
        "sharpness": sharpness(some),
        "motion": float(np.mean([motion_figures(frames[at : at + 3]).motion for at in places])),
    }
    if frames.shape[2:] == (HEIGHT, WIDTH) and len(frames) >= 8 and Scene.has(prompt):
        exact = measure(frames, Scene.of(prompt))
        figures["match"] = (exact["colour"] + exact["shape"]) / 2
    elif match is not None:
        figures["match"] = match(frames, prompt)
    return figures


def _lab(frames: Tensor) -> tuple[float, float, float]:
    """Mean CIE Lab of frames [T, 3, H, W] in [0, 1], D65."""
    pictures = frames.float().movedim(1, -1).flatten(0, 1).contiguous().numpy()  # [T * H, W, 3]
    means = cv2.cvtColor(pictures, cv2.COLOR_RGB2LAB).reshape(-1, 3).mean(0, dtype=np.float64)
    return float(means[0]), float(means[1]), float(means[2])


def _changes(frames: Tensor) -> NDArray[np.float64]:
    """[T + 1, 3, H, W] -> [T] mean absolute differences of neighbours, grey levels."""
    return 255 * (frames[1:] - frames[:-1]).abs().mean((1, 2, 3)).double().numpy()
