"""Motion by optical flow: how much there is, and whether what moves stays itself.

Warp error after Lai et al. (arXiv 1808.00449).
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor

from stream_r1.pixels import check_range, to_uint8

_ENLARGE = 2  # small frames are enlarged for the flow's own patches to fit


class MotionFigures(NamedTuple):
    """One video's figures. Compare warp errors only at like motion: a frozen video has none of either."""

    warp_error: float  # mean absolute difference after motion compensation, grey levels (0 to 255)
    motion: float  # mean length of the flow, pixels a frame
    judder: float  # mean change of the frame difference from step to step, relative to it; 0 is steady


def motion_figures(video: Tensor) -> MotionFigures:
    """Figures of one video [T, 3, H, W] in [0, 1], T >= 3, by DIS optical flow between neighbouring frames.

    Pixels whose forward and backward flows disagree (uncovered, or leaving the picture) are left out of the
    error.
    """
    if video.ndim != 4 or video.shape[1] != 3 or video.shape[0] < 3:
        raise ValueError(f"motion_figures: video: expected [T, 3, H, W] with T >= 3, got {list(video.shape)}")
    check_range(video, "motion_figures: video", finite=True)
    pixels = to_uint8(video).cpu().permute(0, 2, 3, 1).numpy()
    frames = [
        cv2.resize(frame, None, fx=_ENLARGE, fy=_ENLARGE, interpolation=cv2.INTER_CUBIC) for frame in pixels
    ]
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flow_finder = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    errors, lengths = [], []
    for now in range(len(frames) - 1):
        forward = flow_finder.calc(greys[now], greys[now + 1], None)  # type: ignore[call-overload]  # [h, w, 2]
        backward = flow_finder.calc(greys[now + 1], greys[now], None)  # type: ignore[call-overload]
        back_there = _sample(backward, forward)
        mismatch = np.square(forward + back_there).sum(-1)
        visible = mismatch < 0.01 * (np.square(forward).sum(-1) + np.square(back_there).sum(-1)) + 0.5
        difference = np.abs(_sample(frames[now + 1].astype(np.float32), forward) - frames[now]).mean(-1)
        if visible.any():
            errors.append(difference[visible].mean())
        lengths.append(np.sqrt(np.square(forward).sum(-1)).mean() / _ENLARGE)
    steps = np.abs(np.diff(pixels.astype(np.float32), axis=0)).mean((1, 2, 3)) + 0.25
    judder = np.abs(np.diff(steps)).mean() / steps.mean()
    return MotionFigures(float(np.mean(errors)) if errors else 0.0, float(np.mean(lengths)), float(judder))


def _sample(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """image [h, w, C] float32 at positions moved by flow [h, w, 2]."""
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(
        image, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
