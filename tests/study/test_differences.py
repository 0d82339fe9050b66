"""Paired differences and their intervals, beside closed forms and repeated draws."""

import numpy as np
import pytest

from stream_r1.study.differences import difference


def drawn(rng, seeds, videos, shift, between, within, shared):
    """An arm and the one it is compared with: a shift that differs between seeds and between videos."""
    base = {s: shared * rng.standard_normal(videos) for s in range(seeds)}
    arm = {
        s: base[s] + shift + between * rng.standard_normal() + within * rng.standard_normal(videos)
        for s in range(seeds)
    }
    return arm, base


def test_what_both_arms_share_cancels():
    """Videos that differ a thousand times more than the arms do not hide the arms' difference."""
    arm, base = drawn(np.random.default_rng(0), 3, 40, shift=0.5, between=0.0, within=0.1, shared=100.0)
    found = difference(arm, base)
    assert found.mean == pytest.approx(0.5, abs=0.05)
    assert found.clear
    assert found.high - found.low < 0.1


def test_with_one_seed_the_interval_is_that_of_the_mean():
    rng = np.random.default_rng(1)
    change = rng.standard_normal(200)
    found = difference({0: change}, {0: np.zeros(200)})
    half = 1.96 * change.std() / 200**0.5
    assert found.low == pytest.approx(change.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(change.mean() + half, abs=0.15 * half)


def test_the_interval_holds_the_true_difference_about_as_often_as_it_says():
    """With ten seeds; with three it is known to be narrow, which the page says."""
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(200):
        arm, base = drawn(rng, 10, 12, shift=0.3, between=0.2, within=0.5, shared=1.0)
        found = difference(arm, base)
        inside += found.low <= 0.3 <= found.high
    assert 0.84 <= inside / 200 <= 0.99


def test_numbers_that_are_not_finite_leave_out_their_pair():
    found = difference({0: np.array([1.0, np.nan, 3.0])}, {0: np.array([0.0, 0.0, np.inf])})
    assert found.mean == 1.0
    assert difference({0: np.array([np.nan])}, {0: np.array([0.0])}) is None
    assert difference({0: np.ones(3)}, {1: np.ones(3)}) is None


def test_unequal_sets_are_refused():
    with pytest.raises(ValueError, match=r"seed 4, got \[3\] and \[2\]"):
        difference({4: np.ones(3)}, {4: np.ones(2)})
