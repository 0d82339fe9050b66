"""The measures are near 1 on drawings, and each falls, alone where it can, as the thing that it counts goes
wrong.
"""

import numpy as np
import pytest
import torch

from stream_r1.drawn_world import MOTIONS, Scene, all_scenes, draw, draw_random
from stream_r1.drawn_world.laws import fit
from stream_r1.drawn_world.measures import MEASURES, measure, measure_all, spread
from stream_r1.drawn_world.paths import make_path


def video(drawing):
    return torch.from_numpy(drawing.frames).movedim(-1, 1).float() / 255


@pytest.fixture(scope="module")
def clips():
    drawings = [draw_random(all_scenes(), 10_000 + seed) for seed in range(16)]
    return [video(d) for d in drawings], [d.scene for d in drawings]


def figures(videos, scenes):
    return measure_all(videos, [scene.prompt for scene in scenes])


def test_drawings_are_near_one(clips):
    result = figures(*clips)
    assert set(result) == set(MEASURES)
    assert min(result.values()) > 0.93, result


def test_a_little_blur_and_noise_is_borne(clips):
    videos, scenes = clips
    g = torch.Generator().manual_seed(0)
    soft = [torch.nn.functional.avg_pool2d(v, 3, 1, 1, count_include_pad=False) for v in videos]
    result = figures([v + 0.01 * torch.randn(v.shape, generator=g) for v in soft], scenes)
    assert min(result[name] for name in ("presence", "colour", "moves", "law", "shadow")) > 0.85, result


def test_noise_and_an_empty_place_score_nothing(clips):
    videos, scenes = clips
    noise = torch.rand(33, 3, 64, 112, generator=torch.Generator().manual_seed(0))
    assert max(measure(noise, scenes[0]).values()) == 0
    empty = [v.median(0).values.expand_as(v) for v in videos]  # what moves is gone
    moved = [(e, s) for e, s in zip(empty, scenes, strict=True) if s.motion.startswith("rolls")]
    for still, scene in moved:
        assert measure(still, scene)["moves"] == 0


def test_stills_have_everything_but_motion(clips):
    videos, scenes = clips
    result = figures([v[:1].expand_as(v) for v in videos], scenes)
    assert min(result["presence"], result["shape"], result["shadow"], result["steadiness"]) > 0.9
    assert result["law"] < 0.1
    assert result["moves"] < 0.1


def test_each_word_of_the_prompt_is_counted_by_its_measure():
    scene = Scene("red", "star", "rolls to the left", "in the snow at dawn")
    clip = video(draw(scene, 1))
    own = measure(clip, scene)
    for wrong, falling in (
        (Scene("pink", "star", "rolls to the left", "in the snow at dawn"), {"colour"}),
        (Scene("red", "ball", "rolls to the left", "in the snow at dawn"), {"shape"}),
        (Scene("red", "star", "rolls to the right", "in the snow at dawn"), {"moves", "law"}),
        (Scene("red", "star", "bounces", "in the snow at dawn"), {"moves", "law"}),
    ):
        other = measure(clip, wrong)
        for name in MEASURES:
            assert (other[name] < 0.1) if name in falling else (other[name] == own[name] > 0.9), (wrong, name)


def test_a_shadow_elsewhere_or_none_is_missed():
    scene = Scene("blue", "ball", "floats up", "in a meadow at noon")
    clip = video(draw(scene, 2))
    without = clip.clone()
    without[:, :, 44:] = clip[:, :, 44:, :8].mean(-1, keepdim=True)
    assert measure(clip, scene)["shadow"] > 0.9
    assert measure(without, scene)["shadow"] < 0.2
    moved = clip.clone()
    moved[:, :, 50:] = clip[:, :, 50:].roll(30, -1)
    assert measure(moved, scene)["shadow"] < 0.2


def test_a_thing_that_flickers_is_unsteady():
    scene = Scene("yellow", "ball", "rolls to the right", "by the sea at night")
    drawing = draw(scene, 4)
    clip = video(drawing)
    for i in range(0, 33, 2):  # half of it is missing in every other frame
        x = int(drawing.path.x[i])
        clip[i, :, :, x:] = clip[i, :, :, :1]
    assert measure(clip, scene)["steadiness"] < 0.5 * measure(video(drawing), scene)["steadiness"]


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_path_fits_its_own_law_best(motion):
    rng = np.random.default_rng(0)
    for _ in range(6):
        path = make_path(motion, 11.0, 56.0, 33, rng)
        distances = {law: fit(law, path.x, path.y).distance for law in MOTIONS}
        assert distances[motion] < 0.7
        assert min(distances, key=distances.__getitem__) == motion
        with_gaps = np.where(np.arange(33) % 5 == 2, np.nan, path.x)
        assert abs(fit(motion, with_gaps, path.y).distance - distances[motion]) < 0.2
    assert fit(motion, np.full(33, np.nan), np.full(33, np.nan)).distance == np.inf


def test_spread_is_that_of_the_places():
    scene = Scene("pink", "box", "floats up", "in the desert at dusk")
    several = [draw(scene, seed) for seed in range(8)]
    places = np.array([(d.path.x[0], d.path.y[0]) for d in several])
    expected = np.sqrt(((places - places.mean(0)) ** 2).sum(1).mean())
    assert spread([video(d) for d in several]) == pytest.approx(expected, rel=0.1)
    assert spread([video(several[0])] * 3) == 0
    assert np.isnan(spread([torch.zeros(33, 3, 64, 112)] * 2))


def test_what_cannot_be_measured_is_refused():
    scene = all_scenes()[0]
    with pytest.raises(ValueError, match="video"):
        measure(torch.zeros(4, 3, 64, 112), scene)
    with pytest.raises(ValueError, match=r"prompts.*2.*1"):
        measure_all([torch.zeros(9, 3, 64, 112)] * 2, [scene.prompt])
    with pytest.raises(ValueError, match="prompt"):
        measure_all([torch.zeros(9, 3, 64, 112)], ["a rabbit"])
