"""Noise of a stream: a pure function of who asks, so that nothing else can change it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor


class StreamNoise:
    """Standard normal noise by (seed, prompt index, chunk, step).

    A prompt's noise is the same in whatever batch the prompt is, however many chunks are drawn, and on
    whatever device: it is drawn on the CPU in float32 and moved.

    Args:
        seed: one seed, told apart by the prompts' indices, or one seed a prompt.
        batch: number of prompts.
        first_index: index of the first prompt, where a long list is sampled in several batches.

    Raises:
        ValueError: as many seeds as prompts are expected.
        TypeError: seeds must be integers.
    """

    def __init__(self, seed: int | Sequence[int], batch: int, first_index: int = 0) -> None:
        seeds = [seed] * batch if isinstance(seed, int) else list(seed)
        if not all(isinstance(value, int) for value in seeds):
            raise TypeError(f"stream: seed must be an int or a sequence of them, got {seed!r}")
        if len(seeds) != batch:
            raise ValueError(f"stream: seed must be one number or {batch}, one a prompt, got {len(seeds)}")
        # with a seed of its own a prompt is at index 0 wherever it stands
        indices = range(first_index, first_index + batch) if isinstance(seed, int) else [0] * batch
        self._samples = list(zip(seeds, indices, strict=True))
        self._ready: dict[tuple[int, int], Tensor] = {}  # by chunk and pass, drawn ahead

    def prepare(self, chunk: int, steps: int, shape: Sequence[int], device: torch.device) -> None:
        """Draw a chunk's noise of so many passes ahead of `draw`: while a GPU computes the chunk before."""
        self._ready = {(chunk, step): self._host(chunk, step, shape, device) for step in range(steps)}

    def draw(self, chunk: int, step: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """[B, *shape] float32 for pass `step` of chunk `chunk`."""
        noise = self._ready.pop((chunk, step), None)
        if noise is None or noise.shape[1:] != tuple(shape):
            noise = self._host(chunk, step, shape, device)
        return noise.to(device, non_blocking=True)

    def _host(self, chunk: int, step: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """On the CPU; for a GPU in pinned memory, from which Python need not wait for the copy."""
        samples = []
        for seed, index in self._samples:
            key = struct.pack("<4q", seed, index, chunk, step)
            state = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
            generator = torch.Generator().manual_seed(state)
            samples.append(torch.randn(tuple(shape), generator=generator))
        noise = torch.stack(samples)
        return noise.pin_memory() if device.type == "cuda" else noise

    def like(self, chunk: int, step: int, x: Tensor) -> Tensor:
        """`draw` of the shape and on the device of x [B, ...]."""
        return self.draw(chunk, step, x.shape[1:], x.device)
