"""How things move: where a thing is in each frame, by plain mechanics, with the chance that its prompt
leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream_r1.drawn_world.scenes import WIDTH

Array = NDArray[np.float32]

GRAVITY = 0.16  # pixels a frame and frame
RESTITUTION = 0.9  # share of its speed that a thing keeps as it meets the ground
ROLLING = (1.1, 1.8)  # pixels a frame, as the next
RISING = (0.4, 0.8)
SWING_PERIOD = (30.0, 40.0)  # frames


@dataclass(frozen=True)
class Path:
    """x, y: the thing's middle in pixels [T]. angle: how far it has turned, radians [T]. pivot: where its
    rope hangs, (x, y).
    """

    x: Array
    y: Array
    angle: Array
    pivot: tuple[float, float] | None = None


def make_path(motion: str, size: float, floor: float, frames: int, rng: np.random.Generator) -> Path:
    """A path of `motion`, one of `MOTIONS`, for a thing of radius `size` over the ground at row `floor`."""
    t = np.arange(frames, dtype=np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    if motion.startswith("rolls"):
        speed = rng.uniform(*ROLLING)
        way = speed * 32  # from where a clip of usual length stays inside
        x = rng.uniform(size, WIDTH - size - way) + speed * t
        y = np.full(frames, floor - size)
        if motion.endswith("left"):
            x = WIDTH - x
            speed = -speed
        return _path(x, y, turn + speed / size * t)
    if motion == "bounces":
        return _bounce(t, size, floor, turn, rng)
    if motion == "floats up":
        x = rng.uniform(size + 8, WIDTH - size - 8) + rng.uniform(1, 3) * np.sin(
            t * rng.uniform(0.15, 0.25) + rng.uniform(0, 6.3)
        )
        y = floor - size - rng.uniform(1, 6) - rng.uniform(*RISING) * t
        return _path(x, y, turn + rng.uniform(-0.02, 0.02) * t)
    pivot = (rng.uniform(34, WIDTH - 34), rng.uniform(-8, 0))
    length = floor - size - rng.uniform(3, 8) - pivot[1]
    swing = rng.uniform(0.4, 0.6) * np.sin(
        2 * np.pi * t / rng.uniform(*SWING_PERIOD) + rng.uniform(0, 2 * np.pi)
    )
    x, y = pivot[0] + length * np.sin(swing), pivot[1] + length * np.cos(swing)
    return _path(x, y, -swing, pivot)


def _bounce(t: Array, size: float, floor: float, turn: float, rng: np.random.Generator) -> Path:
    height = rng.uniform(16, 26)  # pixels that it falls
    fall = np.sqrt(2 * height / GRAVITY)
    y, speed, heights = floor - size - height, 0.0, []
    begin = rng.uniform(-0.6, 0.6) * fall  # frames since its highest point
    y, speed = y + GRAVITY * begin**2 / 2, GRAVITY * begin
    for _ in t:
        heights.append(y)
        y, speed = y + speed + GRAVITY / 2, speed + GRAVITY
        if y > floor - size:
            y, speed = 2 * (floor - size) - y, -RESTITUTION * speed
    drift = rng.uniform(0.3, 1.0) * rng.choice([-1, 1])
    way = 32 * abs(drift)
    x = rng.uniform(size, WIDTH - size - way) + (way if drift < 0 else 0) + drift * t
    return _path(x, np.array(heights), turn + drift / size * t)


def _path(x: Array, y: Array, angle: Array, pivot: tuple[float, float] | None = None) -> Path:
    return Path(x.astype(np.float32), y.astype(np.float32), np.asarray(angle, np.float32), pivot)
