"""Maps of latent cells over pictures, side by side, and pictures as PNG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image


def heat_strip(
    frames: NDArray[np.uint8],
    heat: NDArray[Any],
    *,
    scale: int = 3,
    opacity: float = 0.65,
    cmap: str = "inferno",
) -> NDArray[np.uint8]:
    """Maps over pictures, side by side.

    Frames ``[F, H, W, 3]``, heat ``[F, h, w]`` in [0, 1]; returns uint8 ``[H', W', 4]``.

    Cells are drawn as they are, without interpolation: what is shown is what the loss is multiplied by.
    """
    shown = []
    colours = colormaps[cmap]
    for frame, values in zip(frames, heat, strict=True):
        big = frame.repeat(scale, 0).repeat(scale, 1).astype(np.float64)
        grey = big.mean(-1, keepdims=True).repeat(3, -1)
        rows, columns = (n // m for n, m in zip(big.shape, values.shape, strict=False))
        cells = np.clip(values, 0.0, 1.0).repeat(rows, 0).repeat(columns, 1)
        alpha = opacity * cells[..., None] ** 0.7
        shown.append((1 - alpha) * (0.55 * big + 0.45 * grey) + alpha * 255.0 * colours(cells)[..., :3])
    return _join(np.stack(shown).round().astype(np.uint8), gap=2 * scale)


def frame_strip(frames: NDArray[np.uint8], *, scale: int = 3) -> NDArray[np.uint8]:
    """Pictures side by side: ``[F, H, W, 3]`` to uint8 ``[H * scale, ..., 3 or 4]``."""
    return _join(frames.repeat(scale, 1).repeat(scale, 2), gap=2 * scale)


def _join(pictures: NDArray[np.uint8], gap: int) -> NDArray[np.uint8]:
    """Side by side with transparent gaps: ``[F, H, W, 3]`` to RGBA ``[H, F * W + gaps, 4]``."""
    count, height, width, _ = pictures.shape
    out = np.zeros((height, count * (width + gap) - gap, 4), np.uint8)
    for place, picture in enumerate(pictures):
        left = place * (width + gap)
        out[:, left : left + width, :3] = picture
        out[:, left : left + width, 3] = 255
    return out


def png(picture: NDArray[np.uint8]) -> bytes:
    """A picture ``[H, W, 3 or 4]`` as PNG."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="PNG", optimize=True)
    return out.getvalue()


def unit_range(values: NDArray[Any], axis: tuple[int, ...] | None = None) -> NDArray[np.float64]:
    """Scaled to [0, 1] over ``axis`` (all by default); constant input gives zeros."""
    low = values.min(axis=axis, keepdims=True)
    span = values.max(axis=axis, keepdims=True) - low
    return np.asarray((values - low) / np.where(span > 0, span, 1.0), np.float64)
