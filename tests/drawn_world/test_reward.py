"""The measured reward: drawings above what is wrong with them, and a gradient that lies on the thing."""

import pytest
import torch
from torch.nn import functional

from stream_r1.drawn_world import HELD_OUT, Scene, all_scenes, draw
from stream_r1.drawn_world.reward import MeasuredReward

SCENES = all_scenes()[::41]
PROMPTS = [scene.prompt for scene in SCENES]


def drawn(scenes=SCENES):
    drawings = [draw(scene, HELD_OUT + i) for i, scene in enumerate(scenes)]
    frames = torch.stack([torch.from_numpy(drawing.frames) for drawing in drawings])
    return frames.movedim(-1, 2).float() / 255, drawings


def blurred(video):
    return functional.avg_pool2d(video.flatten(0, 1), 9, 1, 4, count_include_pad=False).view_as(video)


@pytest.mark.parametrize(
    ("axis", "spoilt"),
    [
        ("VQ", blurred),
        ("VQ", lambda video: video.lerp(video.mean(2, keepdim=True), 0.6)),
        (
            "VQ",
            lambda video: torch.cat((video[:, :, :, :, 56:], video[:, :, :, :, :56]), -1)[:, :, :, :, 28:84],
        ),
        ("MQ", lambda video: video[:, torch.randperm(33, generator=torch.Generator().manual_seed(0))]),
        ("TA", lambda video: video.roll(1, 2)),  # other colours
    ],
)
def test_drawings_are_above_what_is_wrong_with_them(axis, spoilt):
    video, _ = drawn()
    reward = MeasuredReward()
    before, after = (reward.score(x, PROMPTS)[:, reward.axes.index(axis)] for x in (video, spoilt(video)))
    assert (before > after).float().mean() > 0.8
    assert before.mean() > after.mean() + 0.3


def test_another_colour_in_the_prompt_is_seen_by_the_alignment():
    video, _ = drawn()
    other = [
        Scene("blue" if s.colour != "blue" else "red", s.shape, s.motion, s.place).prompt for s in SCENES
    ]
    reward = MeasuredReward()
    assert (reward.score(video, PROMPTS)[:, 2] > reward.score(video, other)[:, 2] + 2).all()


def test_the_gradient_lies_on_the_thing():
    video, drawings = drawn()
    video.requires_grad_()
    (slope,) = torch.autograd.grad(MeasuredReward().score(video, PROMPTS).sum(), video)
    slope = slope.abs().sum(2)
    rows, columns = torch.arange(64)[:, None] + 0.5, torch.arange(112) + 0.5
    for i, drawing in enumerate(drawings):
        x, y = (torch.from_numpy(place)[:, None, None] for place in (drawing.path.x, drawing.path.y))
        near = (rows - y).square() + (columns - x).square() < (1.5 * drawing.size) ** 2
        assert (slope[i] * near).sum() > 0.95 * slope[i].sum()


def test_a_score_does_not_depend_on_its_neighbours():
    video, _ = drawn()
    reward = MeasuredReward()
    alone = torch.cat([reward.score(video[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(video))])
    assert torch.allclose(reward.score(video, PROMPTS), alone, atol=1e-5)


def test_what_it_cannot_score_is_refused():
    reward = MeasuredReward()
    with pytest.raises(ValueError, match="a fat rabbit"):
        reward.score(torch.rand(1, 5, 3, 64, 112), ["a fat rabbit"])
    with pytest.raises(ValueError, match="three frames"):
        reward.score(torch.rand(1, 2, 3, 64, 112), PROMPTS[:1])
