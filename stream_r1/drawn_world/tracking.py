"""Finds the thing in a video of the drawn world by its colour, and names its shape by matching with drawn
outlines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from stream_r1.drawn_world.drawing import outline
from stream_r1.drawn_world.scenes import COLOURS, SHAPES

Array = NDArray[np.float32]

_HUE_REACH = 0.05  # of a full turn; the nearest two colours are .11 apart
_SATURATION, _VALUE = 0.58, 0.27  # below: background, as the places are coloured
_AREA = (130, 620)  # pixels that a thing's colour covers: .5 of the smallest star to 1.25 of the largest ball
_TOGETHER = 0.75  # share of the colour's pixels that have to lie within the reach of one thing
_REACH = 17  # pixels
_LIKENESS = 0.72  # least overlap with an outline, over their union, that makes a shape


@dataclass(frozen=True)
class Track:
    """What was found in each of T frames.

    colour: key of `COLOURS` of which there is a thing in most frames. there: bool [T], one compact thing of
        that colour and of a thing's size.
    x, y: its middle in pixels, nan where it is not. area: pixels of that colour. masks: bool [T, H, W] of
        that colour.
    shapes: the shape in each frame that is there, None where it is like none.
    """

    colour: str
    there: NDArray[np.bool_]
    x: Array
    y: Array
    area: Array
    masks: NDArray[np.bool_]
    shapes: tuple[str | None, ...]


def track(frames: Array) -> Track:
    """The thing in frames [T, H, W, 3], float in [0, 1]."""
    hue, saturation, value = _hue_saturation_value(frames)
    vivid = (saturation > _SATURATION) & (value > _VALUE)
    rows, columns = np.arange(frames.shape[1])[:, None] + 0.5, np.arange(frames.shape[2]) + 0.5
    candidates = []
    for name, paint in COLOURS.items():
        own = _hue_saturation_value(np.array(paint, np.float32))[0]
        masks = vivid & (abs((hue - own + 0.5) % 1 - 0.5) < _HUE_REACH)
        found = [_middle(mask, rows, columns) for mask in masks]
        area = masks.sum((1, 2)).astype(np.float32)
        x, y, share = (np.array(values, np.float32) for values in zip(*found, strict=True))
        there = (area > _AREA[0]) & (area < _AREA[1]) & (share > _TOGETHER)
        candidates.append((name, masks, area, x, y, there))
    colour, masks, area, x, y, there = max(candidates, key=lambda c: (c[-1].sum(), c[2].sum()))
    x, y = np.where(there, x, np.nan), np.where(there, y, np.nan)
    shapes = tuple(_shape(mask, x[i], y[i]) if there[i] else None for i, mask in enumerate(masks))
    return Track(colour, there, x, y, area, masks, shapes)


def _hue_saturation_value(rgb: Array) -> tuple[Array, Array, Array]:
    """Of colours [..., 3] in [0, 1]; hue in turns."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    value, least = rgb.max(-1), rgb.min(-1)
    hue = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi)
    return hue % 1, (value - least) / np.maximum(value, 1e-6), value


def _middle(mask: NDArray[np.bool_], rows: Array, columns: Array) -> tuple[float, float, float]:
    """x and y of a mask's middle, and the share of it that lies around there."""
    if not mask.any():
        return np.nan, np.nan, 0.0
    y = float(np.median(np.broadcast_to(rows, mask.shape)[mask]))
    x = float(np.median(np.broadcast_to(columns, mask.shape)[mask]))
    near = mask & (np.hypot(columns - x, rows - y) < _REACH)
    if not near.any():
        return np.nan, np.nan, 0.0
    weight = near / near.sum()
    return float((weight * columns).sum()), float((weight * rows).sum()), float(near.sum() / mask.sum())


def _shape(mask: NDArray[np.bool_], x: float, y: float) -> str | None:
    """The shape whose outline, of the same area and at its best angle, overlaps the mask most."""
    window = np.zeros((2 * _REACH + 1, 2 * _REACH + 1), bool)
    rows, columns = np.nonzero(mask)
    rows, columns = rows - round(y - 0.5) + _REACH, columns - round(x - 0.5) + _REACH
    inside = (rows >= 0) & (rows < len(window)) & (columns >= 0) & (columns < len(window))
    window[rows[inside], columns[inside]] = True
    area, best, likeness = int(window.sum()), None, _LIKENESS
    for shape in SHAPES:
        masks, areas = _outlines(shape)
        fitting = masks[abs(areas - area) < 0.05 * area + 10]
        if len(fitting):
            overlap = ((fitting & window).sum((1, 2)) / (fitting | window).sum((1, 2))).max()
            if overlap > likeness:
                best, likeness = shape, float(overlap)
    return best


@cache
def _outlines(shape: str) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """A shape at many sizes and angles, [N, side, side] and their areas."""
    side = np.arange(-_REACH, _REACH + 1)
    dy, dx = np.meshgrid(side, side, indexing="ij")
    masks = []
    for angle in np.linspace(
        0,
        {"ball": 0.0, "box": np.pi / 2, "star": 0.4 * np.pi}[shape],
        1 if shape == "ball" else 16,
        endpoint=False,
    ):
        u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        masks += [outline(shape, u / size, v / size) < 0 for size in np.arange(6, 15, 0.4)]
    return np.stack(masks), np.stack(masks).sum((1, 2))
