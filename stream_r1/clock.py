"""Where the time goes: moments in a device's work, and seconds by named parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Moment:
    """A point in a device's work: of a GPU, what its current stream had to do up to now; else now.

    It is recorded without waiting for the GPU. Two moments that are compared are of one device.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._time, self._event = time.perf_counter(), None
        if device is not None and device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(self._stream)

    def wait(self) -> None:
        """What is given to the device's current stream from now on waits for it. Python does not."""
        if self._event is not None:
            self._event.wait(torch.cuda.current_stream(self._stream.device))

    def synchronize(self) -> None:
        """Python waits for it."""
        if self._event is not None:
            self._event.synchronize()

    def query(self) -> bool:
        """Whether the device is past it."""
        return self._event is None or self._event.query()

    def since(self, earlier: Moment) -> float:
        """Seconds from another moment, once both are past."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self.synchronize()
        earlier.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


class Clock:
    """Seconds since it was made, by named parts. Parts do not nest.

    device: of a GPU the time counts that it is at work. It is waited for when seconds are read, not before.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._started = Moment(device)
        self._parts: list[tuple[str, Moment, Moment]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = Moment(self.device)
        try:
            yield
        finally:
            self._parts.append((name, start, Moment(self.device)))

    @property
    def seconds(self) -> dict[str, float]:
        """The parts so far."""
        seconds: dict[str, float] = {}
        for name, start, end in self._parts:
            seconds[name] = seconds.get(name, 0.0) + end.since(start)
        return seconds

    def all_parts(self) -> dict[str, float]:
        """The parts so far and, as "other", what lies between them: the time since the start."""
        seconds, elapsed = self.seconds, Moment(self.device).since(self._started)
        return seconds | {"other": elapsed - sum(seconds.values())}
