"""Latency from records, beside a player that is simulated frame by frame."""

import numpy as np
import pytest

from stream_r1.evaluation.latency import arrivals, deadlines, latency
from stream_r1.evaluation.make import Made


def made(times, frames, fps=16.0, write=None):
    """Of a stream whose chunks take these seconds each."""
    n = len(times)
    return Made(
        {}, fps, (8, 8), list(frames), 0.1, times[0], list(times), [0.0] * n, [0.0] * n, write or [0.0] * n,
        np.cumsum(times).tolist(),
    )  # fmt: skip


def simulated(arrive, frames, fps):
    """A player with a clock: it shows a frame every 1 / fps seconds, and stands still where there is none."""
    ready = np.repeat(arrive, frames)
    first = np.cumsum([0, *frames[:-1]])
    shown, late, stalled = ready[0], set(), 0.0
    for frame in range(1, len(ready)):
        due = shown + 1 / fps
        if ready[frame] > due + 1e-12:
            late.add(int(np.searchsorted(first, frame, side="right")))
            stalled += ready[frame] - due
        shown = max(due, ready[frame])
    return len(late), stalled


def test_deadlines_are_those_of_a_player():
    rng = np.random.default_rng(0)
    for _ in range(50):
        frames = rng.integers(1, 13, 20).tolist()
        arrive = np.cumsum(rng.exponential(0.5, 20)).tolist()
        late, stalled = deadlines(arrive, frames, 16.0)
        wanted = simulated(arrive, frames, 16.0)
        assert late == wanted[0]
        assert stalled == pytest.approx(wanted[1])


def test_a_slow_chunk_is_missed_once_and_writing_counts():
    steady = made([1.0] + [0.7] * 9, [9] + [12] * 9)
    assert deadlines(arrivals(steady), steady.frames, steady.fps)[0] == 1  # 9 frames last .56 s
    written = made([1.0] + [0.7] * 9, [12] * 10, write=[0.1] * 10)
    found = latency([written])
    assert found.missed == 1.0  # .8 s a chunk of .75 s
    assert found.p50 == pytest.approx(0.8)
    assert found.stalled == pytest.approx(60 * 9 * 0.05 / 7.5)
    assert found.fps == pytest.approx(120 / (1.0 + 9 * 0.7 + 1.0))
