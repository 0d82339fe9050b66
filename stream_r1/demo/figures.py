"""The report's curves: inline SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
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


Band = tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]
"""Places, and at each the mean and the ends of a range."""


def bands(
    lines: Mapping[str, Band], *, ylabel: str, xlabel: str = "second", width: float = 4.4, height: float = 2.2
) -> str:
    """Means by name, each line over its range; an ``<svg>``. Gaps where a value is nan."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, (x, mean, low, high)) in enumerate(lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, mean, color=colour, linewidth=1.8, label=name)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        if len(lines) > 1:
            axes.legend(frameon=False, loc="best", ncols=2, fontsize=8)
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
