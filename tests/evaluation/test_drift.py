"""Drift of made-up videos, whose every change is known."""

import colorsys

import numpy as np
import pytest
import torch

from stream_r1.drawn_world import Scene, draw
from stream_r1.evaluation.drift import border_jumps, changes_over, drift_curves, reward_match
from stream_r1.sampling.video import VideoWriter

FPS = 8


def write(path, video):
    with VideoWriter(path, FPS, crf=0) as writer:
        for part in video.split(7):
            writer.write(part)
    return path


def test_curves_follow_what_changes(tmp_path):
    """Ten seconds that fade from grey to red while stripes move, with a flash at every chunk border."""
    frames, borders = 10 * FPS, list(range(9, 10 * FPS, 12))
    x = torch.arange(48.0)
    video = torch.stack(
        [
            torch.stack([base + amount, base - amount, base - amount]).unsqueeze(1).expand(3, 32, 48)
            for t in range(frames)
            for amount in [0.3 * t / (frames - 1)]
            for base in [0.5 + 0.1 * torch.sin((x - 0.5 * t) / 3) + (0.04 if (t - 9) // 12 % 2 == 0 else 0)]
        ]
    )
    found = drift_curves(write(tmp_path / "a.mp4", video), borders, "a", window=2)
    assert {len(curve) for curve in found.values()} == {5}
    wanted = [0.6 * (16 * n + 7.5) / (frames - 1) for n in range(5)]
    assert found["saturation"] == pytest.approx(wanted, abs=0.03)  # H.264 keeps half of the colours' pixels
    assert changes_over(found["saturation"]) == pytest.approx(wanted[-1] - wanted[0], abs=0.03)
    assert np.all(np.diff(found["green-red"]) > 0)
    assert min(found["jump"]) > 1.3
    assert found["motion"] == pytest.approx([0.5] * 5, abs=0.25)
    still = drift_curves(
        write(tmp_path / "b.mp4", video[:1].expand(frames, -1, -1, -1)), borders, "a", window=2
    )
    assert still["motion"] == pytest.approx([0] * 5, abs=0.02)
    assert still["jump"] == pytest.approx([1] * 5, abs=0.05)


def test_a_window_s_size_changes_no_jump():
    changes = np.random.default_rng(0).random(40) + 1
    changes[[9, 21, 33]] *= 5
    found = border_jumps(changes, [9, 21, 33])
    inside = np.concatenate([changes[10:21], changes[22:33]])
    assert found[21] == pytest.approx((changes[21] + 0.25) / (inside.mean() + 0.25))


def test_colours_are_those_of_lab(tmp_path):
    red = torch.tensor(colorsys.hsv_to_rgb(0.0, 1.0, 1.0)).view(1, 3, 1, 1).expand(2 * FPS, 3, 32, 48)
    found = drift_curves(write(tmp_path / "red.mp4", red), [9], "a", window=1)
    # sRGB's red in CIE Lab, D65: 53.24, 80.09, 67.20; H.264 and 8 bits are off by a little
    for name, value in (("lightness", 53.24), ("green-red", 80.09), ("blue-yellow", 67.20)):
        assert found[name] == pytest.approx([value] * 2, abs=1.5)


def test_the_match_is_exact_in_the_drawn_world_and_the_reward_s_elsewhere(tmp_path):
    scene = Scene("red", "ball", "swings on a rope", "in a meadow at noon")
    clip = torch.from_numpy(draw(scene, 0).frames).movedim(3, 1)
    path = write(tmp_path / "drawn.mp4", clip)
    assert drift_curves(path, [9], scene.prompt, window=2)["match"] == pytest.approx([1, 1], abs=0.1)
    other = Scene("blue", "ball", "swings on a rope", "in a meadow at noon").prompt
    assert max(drift_curves(path, [9], other, window=2)["match"]) < 0.6

    class Brightness:
        axes = ("VQ", "TA", "MQ")

        def score(self, video, prompts):
            return torch.tensor([[0.0, len(prompts[0]), 9.0]])

    found = drift_curves(path, [9], "seven l", window=2, match=reward_match(Brightness()))
    assert found["match"] == [7, 7]


def test_a_broken_off_video_is_refused(tmp_path):
    path = write(tmp_path / "a.mp4", torch.rand(40, 3, 32, 48))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ValueError, match=r"a\.mp4"):
        drift_curves(path, [9], "a", window=1)
