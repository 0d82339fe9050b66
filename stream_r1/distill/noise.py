"""Randomness that belongs to samples, not to batches, and the global streams that belong to nobody."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from stream_r1.schedule import FlowSchedule


class SampleNoise:
    """One random stream a sample, so that a sample sees the same noise in whatever batch, micro-batch or
    rank it is.

    Drawn on the CPU and moved, so that the stream does not depend on the device either.

    Args:
        seeds: one a sample.
        device: where the results go.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._streams = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self._streams)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal [B, *shape], float32."""
        return torch.stack([torch.randn(shape, generator=stream) for stream in self._streams]).to(self.device)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal of x's shape and dtype; x [B, ...]."""
        if x.shape[0] != len(self):
            raise ValueError(f"SampleNoise: x must have {len(self)} samples, got {x.shape[0]}")
        return self.randn(*x.shape[1:]).to(x.dtype)

    def dmd_timestep(self, schedule: FlowSchedule, low: float = 20.0, high: float = 980.0) -> Tensor:
        """Timesteps [B] of `FlowSchedule.dmd_timestep`."""
        drawn = [schedule.dmd_timestep(1, stream, low=low, high=high) for stream in self._streams]
        return torch.cat(drawn).to(self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), int64 [B, *shape]."""
        drawn = [torch.randint(high, shape, generator=stream) for stream in self._streams]
        return torch.stack(drawn).to(self.device)


@contextmanager
def global_streams_kept() -> Iterator[None]:
    """Afterwards the global streams of Python, numpy and torch are as they were."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    device = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(device):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002


def seed_global_streams(*numbers: int) -> None:
    """Makes the global streams depend on these non-negative numbers alone: for dropout, and for a reward or
    a decoder that draws from them.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
