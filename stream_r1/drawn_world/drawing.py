"""Draws scenes: sky, sun, hills, plain, shadow and the thing, anti-aliased by signed distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream_r1.drawn_world.paths import Array, Path, make_path
from stream_r1.drawn_world.scenes import COLOURS, FRAMES, HEIGHT, PLACES, WIDTH, Place, Scene

_ROW = np.arange(HEIGHT, dtype=np.float32)[:, None] + 0.5
_COLUMN = np.arange(WIDTH, dtype=np.float32)[None] + 0.5
SIZES = (9.5, 12.5)  # radius of a thing, pixels
HELD_OUT = 1_000_000
"""First seed of clips that no training draws."""


@dataclass(frozen=True)
class Drawing:
    """A clip and its truth.

    frames: uint8 [T, 64, 112, 3]. scene: what it shows. path: where the thing is. size: its radius. floor:
    row of the ground under it, in pixels.
    """

    frames: NDArray[np.uint8]
    scene: Scene
    path: Path
    size: float
    floor: float


def draw(scene: Scene, seed: int | Sequence[int], frames: int = FRAMES) -> Drawing:
    """The clip of a scene that belongs to a seed: the same numbers, the same pixels."""
    rng = np.random.default_rng(seed)
    place = PLACES[scene.place]
    size, horizon, floor, path = _layout(scene, frames, rng)
    camera = float(rng.uniform(-0.5, 0.5)) * np.arange(
        frames, dtype=np.float32
    )  # pixels that the nearer hills move
    picture = _background(place, horizon, camera, rng)
    _shadow(picture, path, size, floor)
    if path.pivot is not None:
        _rope(picture, path)
    paint = np.clip(np.array(COLOURS[scene.colour], np.float32) + rng.normal(0, 0.02, 3), 0, 1) * place.light
    _thing(picture, scene.shape, path, size, paint.astype(np.float32))
    return Drawing((picture.clip(0, 1) * 255 + 0.5).astype(np.uint8), scene, path, size, floor)


def covered(scene: Scene, seed: int | Sequence[int], frames: int = FRAMES, cell: int = 8) -> Array:
    """How much of each square of `cell` pixels the thing of a clip covers: [T, H / cell, W / cell] in
    [0, 1], by a disc around it.
    """
    size, _, _, path = _layout(scene, frames, np.random.default_rng(seed))
    rows, columns = (np.arange(cell / 2, length, cell, dtype=np.float32) for length in (HEIGHT, WIDTH))
    far = np.hypot(columns - path.x[:, None, None], rows[:, None] - path.y[:, None, None])
    return ((1.25 * size - far) / cell + 0.5).clip(0, 1).astype(np.float32)


def _layout(scene: Scene, frames: int, rng: np.random.Generator) -> tuple[float, float, float, Path]:
    """The thing's size, the horizon, the ground under the thing and its path: what a clip's seed draws
    first.
    """
    size, horizon = float(rng.uniform(*SIZES)), float(rng.uniform(34, 42))
    floor = float(rng.uniform(53, 59))
    return size, horizon, floor, make_path(scene.motion, size, floor, frames, rng)


def draw_random(scenes: Sequence[Scene], seed: int, frames: int = FRAMES) -> Drawing:
    """The clip that belongs to a seed, of a scene that it chooses too."""
    rng = np.random.default_rng([seed, 1])
    return draw(scenes[int(rng.integers(len(scenes)))], [seed, 2], frames)


def _background(place: Place, horizon: float, camera: Array, rng: np.random.Generator) -> Array:
    """[T, H, W, 3] in float32."""
    low, high, ground, hills, sun = (
        np.clip(np.array(c) + rng.normal(0, 0.015, 3), 0, 1).astype(np.float32)
        for c in (place.horizon, place.zenith, place.ground, place.hills, place.sun)
    )
    rise = (1 - _ROW / horizon).clip(0, 1) ** 0.8
    sky = np.broadcast_to((low + (high - low) * rise[..., None]), (HEIGHT, WIDTH, 3)).copy()
    sun_x, sun_y = rng.uniform(8, WIDTH - 8), horizon - rng.uniform(*place.sun_height)
    far = np.hypot(_COLUMN - sun_x, _ROW - sun_y)[..., None]
    sky += (sun - sky) * np.maximum(
        0.55 * np.exp(-far / (2.2 * place.sun_size)), (place.sun_size + 0.5 - far).clip(0, 1)
    )
    picture = np.broadcast_to(sky, (len(camera), *sky.shape)).astype(np.float32)
    for share, colour, height in ((0.4, 0.55 * hills + 0.45 * low, 7.0), (1.0, hills, 3.5)):
        x = _COLUMN[0] + share * camera[:, None]  # [T, W]
        wave = sum(
            np.sin(x / rng.uniform(*range_) + rng.uniform(0, 6.3)) * a
            for range_, a in (((10, 16), 0.6), ((5, 7), 0.25))
        )
        crest = horizon - height * (1 + 0.6 * np.asarray(wave, np.float32))[:, None]  # [T, 1, W]
        first, last = int(horizon - 2.3 * height - 1), int(horizon) + 1
        rows = _ROW[first:last]
        part = picture[:, first:last]
        part += (colour - part) * (rows - crest + 0.5).clip(0, 1)[..., None]
    first = int(horizon)
    depth = ((_ROW[first:] - horizon) / (HEIGHT - horizon)).clip(0, 1)[..., None]
    cover = (_ROW[first:] - horizon + 0.5).clip(0, 1)[..., None]
    part = picture[:, first:]
    part += (ground * (0.78 + 0.2 * depth) + low * 0.12 - part) * cover
    return picture


def _shadow(picture: Array, path: Path, size: float, floor: float) -> None:
    """Soft and under the thing; wider and paler the higher that is."""
    above = (floor - size - path.y).clip(0)[:, None, None]
    wide, strength = size * (1.0 + 0.008 * above), 0.5 * np.exp(-above / 45)
    first = int(floor - 7)
    part = picture[:, first:]
    far = ((_COLUMN - path.x[:, None, None]) / wide) ** 2 + ((_ROW[first:] - floor) / 4.0) ** 2
    part *= (1 - strength * (1.3 - far).clip(0, 1))[..., None]


def _rope(picture: Array, path: Path) -> None:
    assert path.pivot is not None
    x, y = path.pivot
    share = (_ROW - y) / (path.y[:, None, None] - y)  # of the way from the pivot to the thing
    line = x + share * (path.x[:, None, None] - x)
    cover = (1.2 - abs(_COLUMN - line)).clip(0, 1) * ((share > 0) & (share < 1))
    picture += (np.float32(0.16) - picture) * (0.9 * cover)[..., None]


def _thing(picture: Array, shape: str, path: Path, size: float, paint: Array) -> None:
    """Only a window around the thing is touched."""
    reach = int(1.35 * size) + 2
    side = np.arange(-reach, reach + 1)
    middle_x, middle_y = np.floor(path.x).astype(int), np.floor(path.y).astype(int)
    rows, columns = middle_y[:, None, None] + side[:, None], middle_x[:, None, None] + side
    dx, dy = columns + 0.5 - path.x[:, None, None], rows + 0.5 - path.y[:, None, None]
    cos, sin = np.cos(path.angle)[:, None, None], np.sin(path.angle)[:, None, None]
    u, v = (cos * dx + sin * dy).astype(np.float32), (cos * dy - sin * dx).astype(np.float32)
    distance = outline(shape, u / size, v / size) * size
    light = -(0.55 * dx + 0.75 * dy) / size  # from the upper left
    shade = 0.80 + 0.26 * light.clip(-1.2, 1.2)
    shade = (
        shade * (1 - 0.35 * (1.8 + distance).clip(0, 1)) * (1 - 0.3 * (2.2 - abs(u)).clip(0, 1))
    )  # rim; a stripe that turns
    glint = 0.55 * np.exp(-((dx + 0.38 * size) ** 2 + (dy + 0.42 * size) ** 2) / (0.05 * size * size))
    colour = paint * shade[..., None]
    colour = colour + (1 - colour) * glint[..., None]
    cover = (0.5 - distance).clip(0, 1)
    frame, row, column = np.nonzero(
        (cover > 0) & (rows >= 0) & (rows < HEIGHT) & (columns >= 0) & (columns < WIDTH)
    )
    at = (frame, rows[frame, row, 0], columns[frame, 0, column])
    there = picture[at]
    picture[at] = there + (colour[frame, row, column] - there) * cover[frame, row, column, None]


def outline(shape: str, u: Array, v: Array) -> Array:
    """Signed distance, negative inside, of a shape of radius about 1 at (u, v), all of the same area within
    a fifth.
    """
    if shape == "ball":
        return np.hypot(u, v) - 1
    if shape == "box":
        a, b = abs(u) - 0.72, abs(v) - 0.72
        return np.hypot(a.clip(0), b.clip(0)) + np.maximum(a, b).clip(None, 0) - 0.14
    # a star of five points: folded into one half of a point, then the distance from its edge
    angle = np.arctan2(u, -v)
    angle = abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    r = np.hypot(u, v)
    x, y = r * np.sin(angle), r * np.cos(angle)
    tip, notch = np.array([0, 1.25]), 0.62 * np.array([np.sin(np.pi / 5), np.cos(np.pi / 5)])
    edge = notch - tip
    along = (((x - tip[0]) * edge[0] + (y - tip[1]) * edge[1]) / (edge @ edge)).clip(0, 1)
    far = np.hypot(x - tip[0] - along * edge[0], y - tip[1] - along * edge[1])
    inside = (x - tip[0]) * edge[1] - (y - tip[1]) * edge[0] > 0
    return np.where(inside, -far, far) - 0.06
