"""Picture statistics: fits recover known distributions; spoilt pictures are further away, more if worse."""

import math

import pytest
import torch
import torch.nn.functional as F

from stream_r1.evaluation.naturalness import (
    CleanStatistics,
    _asymmetric_gaussian,
    luma,
    patch_statistics,
    sharpness,
)


def pictures(count, seed):
    """Smooth random fields with edges: sums of blurred noise at several scales, cut by half-planes."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(count, 3, 64, 112)
    for scale in (1, 2, 4, 8):
        coarse = torch.randn(count, 3, 64 // scale, 112 // scale, generator=generator)
        image += scale**0.7 * F.interpolate(coarse, (64, 112), mode="bicubic", align_corners=False)
    edges = torch.randn(count, 3, 4, 7, generator=generator).sign()
    return (0.5 + 0.04 * image + 0.1 * F.interpolate(edges, (64, 112))).clamp(0, 1)


def test_luma_and_sharpness_of_known_pictures():
    assert luma(torch.ones(1, 3, 2, 2)).flatten().tolist() == pytest.approx([1.0] * 4)
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    assert sharpness(ramp) == pytest.approx(0, abs=1e-3)
    checkers = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float().expand(1, 3, 16, 16)
    assert sharpness(checkers) == pytest.approx(4 * 255)


@pytest.mark.parametrize("shape", [1.0, 2.0, 4.0])
def test_fit_recovers_the_shape_and_the_two_deviations(shape):
    """|x|^shape of a generalised Gaussian is gamma distributed: samples with known parameters."""
    torch.manual_seed(0)
    size = 200_000
    magnitude = torch.distributions.Gamma(1 / shape, 1.0).sample((size,)).double() ** (1 / shape)
    unit = math.sqrt(math.gamma(1 / shape) / math.gamma(3 / shape))  # scale for deviation 1
    left, right = 0.7, 1.4
    # A side's probability is proportional to its deviation.
    sign = torch.where(torch.rand(size) < left / (left + right), -left, right).double()
    got = _asymmetric_gaussian((magnitude * unit * sign)[None])
    assert got[0].item() == pytest.approx(shape, rel=0.03)
    assert got[1].item() == pytest.approx(left, rel=0.02)
    assert got[2].item() == pytest.approx(right, rel=0.02)


def test_clean_is_near_and_spoilt_is_far():
    clean = CleanStatistics.fit(pictures(24, seed=0))
    other = pictures(12, seed=1)
    blurred = F.avg_pool2d(other, 3, 1, 1)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(other.shape, generator=generator)
    same = clean.distance(other)
    assert (
        same
        < clean.distance((other + 0.03 * noise).clamp(0, 1))
        < clean.distance((other + 0.2 * noise).clamp(0, 1))
    )
    assert same < clean.distance(blurred)
    assert sharpness(blurred) < sharpness(other)


def test_distance_to_oneself_is_zero():
    frames = pictures(6, seed=3)
    assert CleanStatistics.fit(frames).distance(frames) == pytest.approx(0, abs=1e-6)


def test_statistics_are_finite_on_flat_pictures_and_refuse_small_ones():
    assert patch_statistics(torch.full((1, 3, 64, 64), 0.5)).isfinite().all()
    with pytest.raises(ValueError, match="32 pixels"):
        patch_statistics(torch.zeros(1, 3, 16, 64))
