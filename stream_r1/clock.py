"""Where the time goes: seconds by named parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Clock:
    """Seconds since it was made, by named parts. Parts do not nest.

    device: a GPU is waited for at the ends of a part, so that its work counts where it was asked for.
    """

    device: torch.device | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def elapsed(self) -> float:
        return self._now() - self.started

    def all_parts(self) -> dict[str, float]:
        """The parts so far and, as "other", what lies between them: the time since the start."""
        return self.seconds | {"other": self.elapsed() - sum(self.seconds.values())}

    def _now(self) -> float:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
