"""What can be asked of the drawn world: a colour, a shape, a motion and a place, each by itself."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

HEIGHT, WIDTH, FRAMES, FPS = 64, 112, 33, 24

Colour = tuple[float, float, float]  # red, green, blue in [0, 1]


@dataclass(frozen=True)
class Place:
    """Where and when, as colours in [0, 1].

    horizon, zenith: of the sky, from below. ground: of the plain, at its near edge. hills: of the nearer
        hills.
    sun: of the sun or moon and its glow. sun_size: its radius in pixels. sun_height: range over the horizon
        in pixels.
    light: how brightly things are lit.
    """

    horizon: Colour
    zenith: Colour
    ground: Colour
    hills: Colour
    sun: Colour
    sun_size: float
    sun_height: tuple[float, float]
    light: float


COLOURS: dict[str, Colour] = {
    "red": (0.88, 0.10, 0.08),
    "yellow": (0.98, 0.80, 0.06),
    "blue": (0.10, 0.20, 0.86),
    "pink": (0.98, 0.26, 0.66),
}
SHAPES = ("ball", "box", "star")
MOTIONS = ("rolls to the left", "rolls to the right", "bounces", "floats up", "swings on a rope")
PLACES: dict[str, Place] = {
    "in a meadow at noon": Place(
        (0.86, 0.93, 0.95),
        (0.45, 0.68, 0.86),
        (0.42, 0.60, 0.30),
        (0.45, 0.60, 0.46),
        (1.0, 1.0, 0.94),
        4.5,
        (20, 32),
        1.0,
    ),
    "in the desert at dusk": Place(
        (0.93, 0.68, 0.50),
        (0.45, 0.37, 0.50),
        (0.56, 0.43, 0.33),
        (0.50, 0.36, 0.36),
        (1.0, 0.88, 0.70),
        7.0,
        (2, 10),
        0.9,
    ),
    "in the snow at dawn": Place(
        (0.95, 0.84, 0.82),
        (0.66, 0.70, 0.82),
        (0.90, 0.92, 0.96),
        (0.72, 0.75, 0.84),
        (1.0, 0.96, 0.90),
        6.0,
        (4, 16),
        0.95,
    ),
    "by the sea at night": Place(
        (0.24, 0.28, 0.38),
        (0.07, 0.09, 0.16),
        (0.14, 0.22, 0.27),
        (0.13, 0.16, 0.23),
        (0.88, 0.90, 0.86),
        4.5,
        (16, 30),
        0.8,
    ),
}


@dataclass(frozen=True)
class Scene:
    """What a prompt says: keys of `COLOURS`, `SHAPES`, `MOTIONS` and `PLACES`."""

    colour: str
    shape: str
    motion: str
    place: str

    @property
    def prompt(self) -> str:
        return f"a {self.colour} {self.shape} {self.motion} {self.place}"

    @staticmethod
    def has(prompt: str) -> bool:
        """Whether a prompt is one of the drawn world's."""
        return prompt in _BY_PROMPT

    @classmethod
    def of(cls, prompt: str) -> Scene:
        """The scene that a prompt describes; ValueError where it describes none."""
        scene = _BY_PROMPT.get(prompt)
        if scene is None:
            raise ValueError(
                f"Scene.of: prompt: expected one of the drawn world's, like {_EXAMPLE!r}, got {prompt[:80]!r}"
            )
        return scene


def all_scenes() -> list[Scene]:
    """Every scene there is, in a fixed order."""
    return [Scene(*parts) for parts in itertools.product(COLOURS, SHAPES, MOTIONS, PLACES)]


_BY_PROMPT = {scene.prompt: scene for scene in all_scenes()}
_EXAMPLE = next(iter(_BY_PROMPT))
