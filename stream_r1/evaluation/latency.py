"""How fast a stream is for who watches it: first frame, every chunk, and deadlines that were missed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from stream_r1.evaluation.make import Made


class Latency(NamedTuple):
    """Of all streams of a model; seconds.

    first_frame: from asking to the first chunk's frames, mean. text: of it, the prompt's embedding.
    p50, p95, p99: quantiles of the time between a chunk's frames and those before, the first left out; with
        writing.
    denoise, cache, decode, write: means a chunk.
    chunks: whose frames had a deadline. missed: share of them that came later than it. stalled: seconds a
        minute of video that a player stands still.
    fps: frames a second, writing included.
    """

    first_frame: float
    text: float
    p50: float
    p95: float
    p99: float
    denoise: float
    cache: float
    decode: float
    write: float
    chunks: int
    missed: float
    stalled: float
    fps: float


def arrivals(made: Made) -> list[float]:
    """Seconds from asking until each chunk is written: its frames can be watched."""
    written, total = [], 0.0
    for elapsed, write in zip(made.elapsed, made.write, strict=True):
        total += write
        written.append(elapsed + total)
    return written


def deadlines(arrive: Sequence[float], frames: Sequence[int], fps: float) -> tuple[int, float]:
    """How many chunks came too late for a player, and how long it stood still in all.

    The player starts with the first chunk and shows `fps` frames a second. A chunk is late if it is not there
    when the frames before it have been shown; the player then waits for it and continues.
    """
    late, stalled = 0, 0.0
    runs_dry = arrive[0] + frames[0] / fps
    for there, count in zip(arrive[1:], frames[1:], strict=True):
        if there > runs_dry:
            late += 1
            stalled += there - runs_dry
        runs_dry = max(there, runs_dry) + count / fps
    return late, stalled


def latency(records: Sequence[Made]) -> Latency:
    """Of one model's videos, at least one of at least one chunk."""
    between = [b - a for made in records for a, b in pairwise(arrivals(made))]
    p50, p95, p99 = np.quantile(between, (0.5, 0.95, 0.99)) if between else (float("nan"),) * 3
    found = [deadlines(arrivals(made), made.frames, made.fps) for made in records]
    chunks = sum(len(made.frames) - 1 for made in records)
    seconds = sum(made.seconds for made in records)
    means = {
        name: float(np.mean([t for made in records for t in getattr(made, name)]))
        for name in ("denoise", "cache", "decode", "write")
    }
    return Latency(
        first_frame=float(np.mean([made.first_frame for made in records])),
        text=float(np.mean([made.text for made in records])),
        p50=float(p50),
        p95=float(p95),
        p99=float(p99),
        **means,
        chunks=chunks,
        missed=sum(late for late, _ in found) / max(chunks, 1),
        stalled=60 * sum(stalled for _, stalled in found) / seconds,
        fps=sum(sum(made.frames) for made in records) / sum(arrivals(made)[-1] for made in records),
    )


def latency_figures(made: Made) -> dict[str, float]:
    """Of one video: first frame and the median time between chunks in seconds, share of deadlines missed."""
    arrive = arrivals(made)
    late, _ = deadlines(arrive, made.frames, made.fps)
    figures = {"first frame": made.first_frame, "missed": late / max(len(arrive) - 1, 1)}
    if len(arrive) > 1:
        figures["chunk"] = float(np.median([b - a for a, b in pairwise(arrive)]))
    return figures
