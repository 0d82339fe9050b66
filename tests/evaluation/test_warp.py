"""Optical-flow figures on motion that is known exactly."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stream_r1.evaluation.warp import motion_figures


def pan(pixels_a_frame, frames=8):
    """A smooth random picture that moves sideways."""
    generator = torch.Generator().manual_seed(0)
    picture = F.interpolate(torch.rand(1, 3, 20, 60, generator=generator), (80, 240), mode="bicubic")[
        0
    ].clamp(0, 1)
    return torch.stack(
        [picture[:, 8:72, pixels_a_frame * t : pixels_a_frame * t + 112] for t in range(frames)]
    )


@pytest.mark.parametrize("speed", [1, 2])
def test_flow_finds_the_speed_of_a_pan(speed):
    figures = motion_figures(pan(speed))
    assert figures.motion == pytest.approx(speed, rel=0.15)
    assert figures.warp_error < 2


def test_frozen_video_has_no_motion_and_no_error():
    figures = motion_figures(pan(1)[:1].expand(8, -1, -1, -1))
    assert figures.motion == pytest.approx(0, abs=0.01)
    assert figures.warp_error == pytest.approx(0, abs=0.01)
    assert figures.judder == pytest.approx(0, abs=1e-6)


def test_flicker_and_noise_raise_the_warp_error():
    clean = pan(1)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(clean.shape, generator=generator)
    gains = 1 + 0.3 * torch.tensor([0.0, 1, -1, 1, 0, -1, 1, -1]).view(-1, 1, 1, 1)
    errors = [motion_figures((clean + k * noise).clamp(0, 1)).warp_error for k in (0.0, 0.05, 0.15)]
    assert errors == sorted(errors)
    assert motion_figures((clean * gains).clamp(0, 1)).warp_error > errors[0]


def test_stutter_raises_judder():
    clean = pan(1, frames=12)
    held = clean[np.arange(12) // 3 * 3]
    assert motion_figures(held).judder > 5 * motion_figures(clean).judder


def test_refuses_two_frames():
    with pytest.raises(ValueError, match="T >= 3"):
        motion_figures(torch.zeros(2, 3, 32, 32))
