"""Timing on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def time_rotated(
    calls: Sequence[Callable[[], object]], device: torch.device, budget: float
) -> tuple[float, float, int]:
    """Median and smallest seconds of a call, and how many were timed.

    Args:
        calls: the same work on different memory, in turn: what one call leaves in the L2 cache is no help to
            the next.
        budget: seconds for all of it.
    """
    for call in calls:
        call()
    _wait(device)
    started = time.perf_counter()
    calls[0]()
    _wait(device)
    once = max(1e-6, time.perf_counter() - started)
    rounds = max(5, min(200, int(budget / once)))
    if device.type != "cuda":
        seconds = []
        for index in range(rounds):
            started = time.perf_counter()
            calls[index % len(calls)]()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds), min(seconds), rounds
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for index, (start, end) in enumerate(events):
        start.record()
        calls[index % len(calls)]()
        end.record()
    _wait(device)
    seconds = [start.elapsed_time(end) / 1e3 for start, end in events]
    return statistics.median(seconds), min(seconds), rounds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
