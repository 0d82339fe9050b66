"""Which law a thing's path follows: each motion's own, fitted by least squares within what prompts may
mean.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_r1.drawn_world.paths import GRAVITY, RESTITUTION, RISING, ROLLING, SWING_PERIOD

Array = NDArray[np.float64]
Places = NDArray[np.floating]

_TOLERANCE = 0.25  # of a speed, beyond the range that drawings have


class Fit(NamedTuple):
    """How well a path follows a law.

    distance: root mean square distance of the path from the law's best, pixels. speed: that path's mean
    speed, pixels a frame.
    """

    distance: float
    speed: float


def fit(motion: str, x: Places, y: Places) -> Fit:
    """The best path of `motion` through x, y [T] in pixels; frames that are nan do not count, 8 at least
    must.
    """
    t = np.arange(len(x), dtype=np.float64)
    known = ~(np.isnan(x) | np.isnan(y))
    if known.sum() < 8:
        return Fit(np.inf, 0.0)
    return _fit(motion, t[known], x[known].astype(np.float64), y[known].astype(np.float64), known)


def _fit(motion: str, t: Array, x: Array, y: Array, known: NDArray[np.bool_]) -> Fit:
    """Of x and y [n] in the frames t [n], which are the `known` [T] ones."""
    if motion.startswith("rolls"):
        sign = -1 if motion.endswith("left") else 1
        speed = _slope(t, sign * x, ROLLING)
        return Fit(_rms(_off(x - sign * speed * t), _off(y)), speed)
    if motion == "floats up":
        speed = _slope(t, -y, RISING)
        sway = min(_residual(x, wave) for wave in _waves(t, (0.15, 0.2, 0.25)))
        return Fit(float(np.hypot(np.sqrt(np.mean(_off(y + speed * t) ** 2)), sway)), speed)
    if motion == "bounces":
        heights = _bounces(len(known))[:, known]
        away = y - heights
        vertical = np.sqrt(((away - away.mean(1, keepdims=True)) ** 2).mean(1))
        best = int(vertical.argmin())
        drift = np.polyfit(t, x, 1)
        sideways = np.sqrt(np.mean((x - np.polyval(drift, t)) ** 2))
        return Fit(float(np.hypot(vertical[best], sideways)), float(np.abs(np.diff(heights[best])).mean()))
    swings = _swings(len(known))[:, known]
    sine, cosine = np.sin(swings), np.cos(swings)
    # x = a + l sine, y = b + l cosine, by least squares in a, b and l, which is kept to what ropes there are
    sine_off, cosine_off = sine - sine.mean(1, keepdims=True), cosine - cosine.mean(1, keepdims=True)
    length = (sine_off @ _off(x) + cosine_off @ _off(y)) / (sine_off**2 + cosine_off**2).sum(1)
    length = length.clip(28, 62)[:, None]
    distance = np.sqrt(((_off(x) - length * sine_off) ** 2 + (_off(y) - length * cosine_off) ** 2).mean(1))
    best = int(distance.argmin())
    return Fit(float(distance[best]), float((length[best] * np.abs(np.diff(swings[best]))).mean()))


@cache
def still_distance(motion: str, frames: int) -> float:
    """How far a thing that stands still is from a law."""
    return fit(motion, np.zeros(frames), np.zeros(frames)).distance


def _slope(t: Array, x: Array, speeds: tuple[float, float]) -> float:
    """Of the line through x(t), within the range that a prompt may mean."""
    slope = float(_off(t) @ _off(x) / (_off(t) @ _off(t)))
    return float(np.clip(slope, (1 - _TOLERANCE) * speeds[0], (1 + _TOLERANCE) * speeds[1]))


def _off(x: Array) -> Array:
    return x - x.mean()


def _rms(x: Array, y: Array) -> float:
    return float(np.sqrt(np.mean(x**2 + y**2)))


def _waves(t: Array, rates: tuple[float, ...]) -> list[Array]:
    return [np.stack([np.ones_like(t), np.sin(rate * t), np.cos(rate * t)], 1) for rate in rates]


def _residual(x: Array, basis: Array) -> float:
    """Root mean square of what a basis [T, n] leaves of x, its waves no larger than drawings have."""
    weights = np.linalg.lstsq(basis, x, rcond=None)[0]
    size = np.hypot(*weights[1:])
    if size > 4:
        weights[1:] *= 4 / size
        weights[0] = np.mean(x - basis[:, 1:] @ weights[1:])
    return float(np.sqrt(np.mean((x - basis @ weights) ** 2)))


@cache
def _bounces(frames: int) -> Array:
    """Heights over time of all bounces that drawings have, [N, T], downwards from the highest point."""
    out = []
    for height, share in product(np.arange(15, 27.1, 0.75), np.arange(-0.65, 0.66, 0.05)):
        begin = share * np.sqrt(2 * height / GRAVITY)
        y, speed, path = GRAVITY * begin**2 / 2, GRAVITY * begin, []
        for _ in range(frames):
            path.append(y)
            y, speed = y + speed + GRAVITY / 2, speed + GRAVITY
            if y > height:
                y, speed = 2 * height - y, -RESTITUTION * speed
        out.append(path)
    return np.array(out)


@cache
def _swings(frames: int) -> Array:
    """Angles over time of all swings that drawings have, [N, T]."""
    t = np.arange(frames)
    chances = product(
        np.arange(0.36, 0.66, 0.06),
        np.arange(SWING_PERIOD[0] - 1, SWING_PERIOD[1] + 2),
        np.arange(0, 2 * np.pi, np.pi / 24),
    )
    return np.array([width * np.sin(2 * np.pi * t / period + phase) for width, period, phase in chances])
