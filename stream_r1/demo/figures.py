"""The report's pictures: curves as inline SVG that follows the page's colours, maps over frames as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
from matplotlib import colormaps
from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour; replaced by ``currentColor`` in the SVG."""
COLOURS = ("#2f81d6", "#d9822b", "#3fa66b", "#a05cc5", "#c94f5d")
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.hashsalt": "stream-r1",
}


def smooth(values: Sequence[float], span: int) -> NDArray[np.float64]:
    """Running mean over the last ``span`` values, as long as the input."""
    sums = np.cumsum(np.concatenate(([0.0], np.asarray(values, np.float64))))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - span, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def curve(
    lines: dict[str, list[tuple[int, float]]],
    *,
    ylabel: str,
    log: bool = False,
    width: float = 4.4,
    height: float = 2.2,
    xlabel: str = "step",
) -> str:
    """Points ``(x, y)`` by name, each line thin as measured under its running mean; an ``<svg>``."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
            x, y = [point[0] for point in points], [point[1] for point in points]
            span = max(1, len(y) // 12)
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(x, smooth(y, span), color=colour, linewidth=1.8, label=name)
        if log:
            axes.set_yscale("log")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        if len(lines) > 1:
            axes.legend(frameon=False, loc="best", ncols=len(lines), fontsize=8)
        return _svg(figure)


def profile_bars(values: Sequence[float], *, width: float = 4.4, height: float = 1.5) -> str:
    """The temporal weights, one bar a latent frame, with the line of plain DMD (1)."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(range(len(values)), values, color=COLOURS[0], width=0.7)
        axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
        axes.set_xticks(range(len(values)))
        axes.set_xlabel("latent frame")
        axes.set_ylabel("weight")
        return _svg(figure)


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", text, count=2)


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
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="PNG", optimize=True)
    return out.getvalue()


def unit_range(values: NDArray[Any], axis: tuple[int, ...] | None = None) -> NDArray[np.float64]:
    """Scaled to [0, 1] over ``axis`` (all by default); constant input gives zeros."""
    low = values.min(axis=axis, keepdims=True)
    span = values.max(axis=axis, keepdims=True) - low
    return np.asarray((values - low) / np.where(span > 0, span, 1.0), np.float64)
