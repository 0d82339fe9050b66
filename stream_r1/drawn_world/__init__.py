"""A drawn world: one thing of some colour and shape moves through some place, and everything about it is
known.

A prompt says what, where and how; size, place, speed, phase, hue, hills, light and camera are left to
chance. Clips never end (a seed each), cost milliseconds, and carry their truth, so that videos can be
measured without a learnt judge.
"""

from stream_r1.drawn_world.drawing import HELD_OUT, Drawing, draw, draw_random
from stream_r1.drawn_world.scenes import (
    COLOURS,
    FPS,
    FRAMES,
    HEIGHT,
    MOTIONS,
    PLACES,
    SHAPES,
    WIDTH,
    Scene,
    all_scenes,
)

__all__ = [
    "COLOURS",
    "FPS",
    "FRAMES",
    "HEIGHT",
    "HELD_OUT",
    "MOTIONS",
    "PLACES",
    "SHAPES",
    "WIDTH",
    "Drawing",
    "Scene",
    "all_scenes",
    "draw",
    "draw_random",
]
