"""KID against its definition written as loops, and its behaviour on known distributions."""

import pytest
import torch

from stream_r1.evaluation.kid import FrameFeatures, kernel_distance


def normal(count, dim=6, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) + shift


def loops(x, y):
    """Unbiased MMD^2 (Gretton et al. 2012, eq. 3) with the kernel (x.y/d + 1)^3, term by term."""
    y_mean, y_std = y.mean(0), y.std(0) + 1e-6
    x, y = ((z - y_mean) / y_std for z in (x, y))

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(kernel(x[i], y[j]) for i in range(n) for j in range(m)) / (n * m)
    return xx + yy - 2 * xy


def test_equals_its_definition():
    x, y = normal(7, seed=1, shift=0.3), normal(9, seed=2)
    assert kernel_distance(x, y) == pytest.approx(loops(x, y), rel=1e-10)


def test_one_distribution_gives_about_zero_and_shifts_order():
    same = [kernel_distance(normal(200, seed=s), normal(200, seed=s + 100)) for s in range(12)]
    assert abs(sum(same) / len(same)) < 0.02
    assert min(same) < 0, "an unbiased estimate is as often below zero as above"
    reference = normal(200, seed=50)
    near, far = (kernel_distance(normal(200, seed=3, shift=shift), reference) for shift in (0.3, 0.8))
    assert max(same) < near < far


def test_scale_of_a_dimension_does_not_matter():
    x, y, gains = normal(20, seed=1, shift=0.2), normal(30, seed=2), torch.logspace(-2, 3, 6).double()
    assert kernel_distance(x * gains, y * gains) == pytest.approx(kernel_distance(x, y), rel=1e-3)


@pytest.mark.parametrize(("x", "y"), [((3, 6), (3, 5)), ((1, 6), (3, 6)), ((3,), (3, 6))])
def test_refuses(x, y):
    with pytest.raises(ValueError, match="kernel_distance: features"):
        kernel_distance(torch.zeros(x), torch.zeros(y))


def test_frame_features_do_not_depend_on_the_batch():
    extract = FrameFeatures()
    frames = torch.rand(3, 3, 32, 56, generator=torch.Generator().manual_seed(0))
    features = extract(frames)
    assert features.shape == (3, 352)
    assert torch.allclose(extract(frames, batch=1), features, atol=1e-4)
