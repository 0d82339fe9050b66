"""Drawings are what they say: the same by seed, open otherwise, by the laws of mechanics, in the colours
asked for.
"""

import numpy as np
import pytest

from stream_r1.drawn_world import COLOURS, MOTIONS, PLACES, SHAPES, Scene, all_scenes, draw, draw_random
from stream_r1.drawn_world.drawing import outline
from stream_r1.drawn_world.paths import GRAVITY, RISING, ROLLING, make_path


def test_prompts_and_scenes_are_one_to_one():
    scenes = all_scenes()
    prompts = {scene.prompt for scene in scenes}
    assert len(prompts) == len(scenes) == len(COLOURS) * len(SHAPES) * len(MOTIONS) * len(PLACES)
    assert all(Scene.of(scene.prompt) == scene for scene in scenes)
    with pytest.raises(ValueError, match=r"prompt.*a fat rabbit"):
        Scene.of("a fat rabbit")


def test_a_seed_gives_the_same_clip_and_another_seed_another():
    scene = all_scenes()[17]
    first, again, other = draw(scene, 5), draw(scene, 5), draw(scene, 6)
    assert first.frames.shape == (33, 64, 112, 3)
    assert first.frames.dtype == np.uint8
    assert np.array_equal(first.frames, again.frames)
    assert abs(first.path.x[0] - other.path.x[0]) > 0.1
    assert first.size != other.size
    assert not np.array_equal(first.frames[:, :20], other.frames[:, :20])  # sky and hills differ as well


def test_chance_reaches_every_scene():
    seen = {draw_random(all_scenes(), seed, frames=1).scene for seed in range(150)}
    for part in ("colour", "shape", "motion", "place"):
        assert len({getattr(scene, part) for scene in seen}) == len({getattr(s, part) for s in all_scenes()})


@pytest.mark.parametrize("seed", range(5))
def test_paths_keep_the_laws(seed):
    size, floor = 11.0, 56.0
    of = {m: make_path(m, size, floor, 33, np.random.default_rng(seed)) for m in MOTIONS}
    for motion, sign in (("rolls to the left", -1), ("rolls to the right", 1)):
        speeds = sign * np.diff(of[motion].x)
        assert np.allclose(speeds, speeds[0], atol=1e-4)
        assert ROLLING[0] <= speeds[0] <= ROLLING[1]
        assert np.allclose(
            np.diff(of[motion].angle) * size, sign * speeds, atol=1e-4
        )  # it rolls, it does not slide
        assert of[motion].x.min() > size - 0.01
        assert of[motion].x.max() < 112 - size + 0.01
    assert RISING[0] <= -np.diff(of["floats up"].y).mean() <= RISING[1]
    fall = np.diff(of["bounces"].y, 2)
    in_flight = np.abs(fall - GRAVITY) < 1e-3
    assert in_flight.sum() >= 33 - 2 - 2 * 3  # all but the frames around at most three contacts
    assert of["bounces"].y.max() <= floor - size + 1e-3
    swing = of["swings on a rope"]
    assert (
        np.ptp(np.hypot(swing.x - swing.pivot[0], swing.y - swing.pivot[1])) < 1e-3
    )  # the rope keeps its length


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_distances_and_of_like_area(shape):
    side = np.linspace(-2, 2, 401)
    u, v = np.meshgrid(side, side)
    distance = outline(shape, u, v)
    slope = np.hypot(*np.gradient(distance, side, side))
    near = abs(distance) < 0.1
    assert np.median(abs(slope[near] - 1)) < 0.02
    assert 0.75 < (distance < 0).sum() * 1e-4 / np.pi < 1.05
    assert outline(shape, np.zeros(1), np.zeros(1)) < -0.4


def test_the_thing_is_where_the_truth_says_and_in_its_paint():
    for seed in range(8):
        drawing = draw_random(all_scenes(), seed)
        paint = np.array(COLOURS[drawing.scene.colour])
        for i in (0, 16, 32):
            x, y = int(drawing.path.x[i]), int(drawing.path.y[i])
            if 3 <= y < 61:
                spot = drawing.frames[i, y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 3).mean(0)
                assert spot.argmax() == paint.argmax()
                assert spot.argmin() == paint.argmin()


def test_nothing_but_the_thing_its_shadow_and_the_hills_changes():
    drawing = draw(Scene("red", "ball", "rolls to the right", "in a meadow at noon"), 3)
    sky = drawing.frames[:, :12].astype(int)
    assert abs(sky - sky[:1]).max() == 0
