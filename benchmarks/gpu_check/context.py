"""What a stage is given."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import records


class CannotRunError(RuntimeError):
    """What a stage needs is not there; its message says what."""


@dataclass(frozen=True)
class Context:
    """Where a stage runs, and until when.

    Attributes:
        device: the GPU; the CPU as a stand-in, with small sizes, to try a stage's plumbing.
        out: the folder of `results.jsonl`.
        until: the time (`time.time()`) at which the stage is killed.
    """

    stage: str
    device: torch.device
    out: Path
    until: float

    @property
    def small(self) -> bool:
        """Whether sizes are those of the stand-in."""
        return self.device.type != "cuda"

    @property
    def left(self) -> float:
        """Seconds until the stage is killed."""
        return self.until - time.time()

    def record(self, kind: str, **facts: Any) -> None:
        """Keeps what was found, whatever comes after."""
        records.append(self.out / "results.jsonl", {"stage": self.stage, "kind": kind, **facts})

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
