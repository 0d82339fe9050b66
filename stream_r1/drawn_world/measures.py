"""Exact measures of videos of the drawn world: what a prompt says is counted, nothing is judged by what was
learnt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stream_r1.drawn_world.laws import fit, still_distance
from stream_r1.drawn_world.scenes import MOTIONS, Scene
from stream_r1.drawn_world.tracking import Track, track
from stream_r1.pixels import check_range

MEASURES = {
    "presence": "share of frames that show one compact thing of one of the world's colours",
    "colour": "share of frames in which it is there in the prompt's colour",
    "shape": "share of frames in which it is there in the prompt's shape, by overlap with drawn outlines",
    "moves": "1 where the path fits the prompt's motion, its direction and speed, and no other better",
    "law": "how closely the path keeps to the prompt's motion: 1 on it, .37 at 2 pixels from it",
    "shadow": "share of frames with a shadow on the ground under the thing",
    "steadiness": "how little its area changes from frame to frame: 1 not at all, .37 by a quarter",
}
"""Name of a measure: its meaning. All lie in [0, 1], higher is better; a drawing through the autoencoder is
near 1.
"""

_LAW_PIXELS = 2.0
_STEADY = 0.25
_NEARER = 0.5  # a path has to be this much nearer to a motion than a thing that stands still is


def measure(video: Tensor, scene: Scene) -> dict[str, float]:
    """The figures of `MEASURES` for one video [T, 3, H, W], floating point in [0, 1], T >= 8, at the
    world's own size.
    """
    if video.dim() != 4 or video.shape[1] != 3 or video.shape[0] < 8 or not video.is_floating_point():
        raise ValueError(
            "measure: video: expected floating-point [T, 3, H, W] with T >= 8, "
            f"got {video.dtype} {list(video.shape)}"
        )
    check_range(video, "measure: video", finite=True)
    frames = video.detach().float().cpu().movedim(1, -1).numpy()
    found = track(frames)
    own_colour = found.colour == scene.colour
    fits = {motion: fit(motion, found.x, found.y).distance for motion in MOTIONS}
    nearest, still = min(fits, key=fits.__getitem__), still_distance(scene.motion, len(frames))
    there = float(found.there.mean())
    return {
        "presence": there,
        "colour": there * own_colour,
        "shape": float(np.mean([shape == scene.shape for shape in found.shapes])),
        "moves": float(there > 0.5 and nearest == scene.motion and fits[nearest] < _NEARER * still),
        "law": there * float(np.exp(-((fits[scene.motion] / _LAW_PIXELS) ** 2))),
        "shadow": _shadow(frames, found),
        "steadiness": there * _steadiness(found),
    }


def measure_all(videos: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> dict[str, float]:
    """Means of the figures over videos and their prompts; ValueError where a prompt is not the drawn
    world's.
    """
    if len(videos) != len(prompts) or not len(videos):
        raise ValueError(
            f"measure_all: prompts: expected one for each of {len(videos)} videos, at least one, "
            f"got {len(prompts)}"
        )
    rows = [measure(video, Scene.of(prompt)) for video, prompt in zip(videos, prompts, strict=True)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in MEASURES}


def spread(videos: Tensor | Sequence[Tensor]) -> float:
    """How differently videos of one prompt begin: the deviation, in pixels, of the thing's first places
    around their mean.

    nan where fewer than two videos show a thing. Beside that of drawings it says whether chance was kept.
    """
    starts = []
    for video in videos:
        check_range(video, "spread: videos", finite=True)
        found = track(video.detach().float().cpu().movedim(1, -1).numpy())
        if found.there.any():
            first = int(found.there.argmax())
            starts.append((found.x[first], found.y[first]))
    if len(starts) < 2:
        return float("nan")
    places = torch.tensor(np.array(starts))
    return float((places - places.mean(0)).square().sum(1).mean().sqrt())


def _steadiness(found: Track) -> float:
    areas = found.area[found.there]
    if len(areas) < 2:
        return 0.0
    change = np.abs(np.diff(areas)) / areas.mean()
    return float(np.exp(-((np.sqrt(np.mean(change**2)) / _STEADY) ** 2)))


def _shadow(frames: NDArray[np.float32], found: Track) -> float:
    """Where the ground is darkest beside its own rows, less what the thing covers, there the shadow has to
    be.
    """
    height, width = frames.shape[1:3]
    first = round(0.78 * height)
    ground = frames[:, first:].mean(-1)  # [T, rows, W]
    usual = np.median(ground, axis=2, keepdims=True)
    darker = (1 - ground / np.maximum(usual, 1e-3)).clip(0, 1)
    columns = np.arange(width) + 0.5
    right = 0
    for i in np.flatnonzero(found.there):
        covered = _grown(found.masks[i])[first:]
        open_ = ~covered
        profile = (darker[i] * open_).sum(0) / np.maximum(open_.sum(0), 3)  # [W]
        smooth = np.convolve(profile, np.ones(15) / 15, "same")
        place = int(smooth.argmax())
        near = profile[abs(columns - columns[place]) < 12]
        middle = float((columns * smooth**4).sum() / max((smooth**4).sum(), 1e-9))
        right += bool(abs(middle - found.x[i]) < 6 and near.mean() > 0.03)
    return right / len(frames)


def _grown(mask: NDArray[np.bool_], by: int = 2) -> NDArray[np.bool_]:
    padded = np.pad(mask, by)
    height, width = mask.shape
    shifts = [(a, b) for a in range(2 * by + 1) for b in range(2 * by + 1)]
    return np.any([padded[a : a + height, b : b + width] for a, b in shifts], axis=0)
