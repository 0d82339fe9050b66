"""The jackknife against what it is for a mean, and against fresh draws of what is no mean."""

import math

import pytest
import torch

from stream_r1.evaluation.kid import kernel_distance, kernel_distances
from stream_r1.evaluation.spread import Figure, standard_error


def test_of_a_mean_it_is_the_usual_standard_error():
    values = [0.3, 1.0, -2.0, 4.5, 0.0]
    figure = Figure.mean(values)
    assert figure.value == pytest.approx(sum(values) / 5)
    assert figure.without[3] == pytest.approx((0.3 + 1.0 - 2.0 + 0.0) / 4)
    deviation = torch.tensor(values, dtype=torch.float64).std().item()
    assert figure.spread == pytest.approx(deviation / math.sqrt(5))


def test_kid_without_each_video_is_that_of_the_others():
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) + 0.3
    reference = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    value, *without = kernel_distances(features, reference, 4)
    assert value == kernel_distance(features, reference)
    for video, got in enumerate(without):
        others = torch.cat([features[: 4 * video], features[4 * video + 4 :]])
        assert got == pytest.approx(kernel_distance(others, reference), rel=1e-9)


def test_the_spread_of_kid_is_how_much_it_varies_over_sets_of_videos():
    """Frames of a video are alike, as in reality: the videos are what counts."""
    generator = torch.Generator().manual_seed(2)
    reference = torch.randn(80, 4, generator=generator)
    values, spreads = [], []
    for _ in range(60):
        videos = torch.randn(24, 1, 4, generator=generator) + 0.5
        features = (videos + 0.1 * torch.randn(24, 3, 4, generator=generator)).flatten(0, 1)
        value, *without = kernel_distances(features, reference, 3)
        values.append(value)
        spreads.append(standard_error(without))
    actual = torch.tensor(values).std().item()
    assert sum(spreads) / len(spreads) == pytest.approx(actual, rel=0.35)
