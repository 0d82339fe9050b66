"""What a trainer tells while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from stream_r1.distill.weighting import Weights


@dataclass(frozen=True)
class Preview:
    """What the reward saw in a generator update (its last micro-batch)."""

    prompts: list[str]
    video: Tensor  # [B, T, 3, H, W] in [0, 1]
    weights: Weights


@dataclass(frozen=True)
class StepDone:
    """One step's numbers. `step` counts from 1 to `steps`."""

    step: int
    steps: int
    scalars: dict[str, float]
    seconds: dict[str, float]
    preview: Preview | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path
    why: Literal["interval", "stopped", "finished"]


Event = StepDone | Saved


@dataclass
class Clock:
    """Seconds spent in named parts. Parts do not nest."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
