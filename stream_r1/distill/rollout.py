"""Self-rollout: the student makes a video chunk by chunk, as it will when sampling, and learns from it.

    chunk 0: steps before the exit (no grad) -> exit step (grad) -> x0 -> clean pass (no grad) leaves K, V
    chunk 1: the same, reading what chunk 0 left ...

Every chunk leaves at the same exit step. What a chunk reads of earlier chunks is data, so the gradient of a
chunk's x0 goes through its own exit step and nothing else. Source: Self Forcing (2506.08009), without its
in-place cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stream_r1.models.contexts import TextContext
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule


class Rollout:
    """A video that a student is making, chunk by chunk.

    Args:
        text: `student.encode_text(...)`; with a graph when its weights should learn.
        size: batch, height and width of the latents.
        max_frames: of the video; a student with a window makes any number of frames in the same memory.
        steps: the student's timesteps, already warped, falling, in (0, 1000].
        exit_step: index of the step whose x0 a chunk is, for all chunks.
        renoise: fresh noise like the tensor it is given.
        context_noise: timestep of the pass that leaves keys and values for later chunks; 0 is the clean x0.
    """

    def __init__(
        self,
        student: CausalWanTransformer,
        text: TextContext,
        size: tuple[int, int, int],
        *,
        max_frames: int,
        schedule: FlowSchedule,
        steps: Sequence[float],
        exit_step: int,
        renoise: Callable[[Tensor], Tensor] = torch.randn_like,
        context_noise: float = 0.0,
    ) -> None:
        if not 0 <= exit_step < len(steps):
            raise ValueError(f"Rollout: exit_step must be in [0, {len(steps)}), got {exit_step}")
        self.student = student
        self.text, self._data = text, text.detach()
        self.cache = student.new_cache(*size, max_frames=max_frames)
        self.schedule = schedule
        self.steps = steps
        self.exit_step = exit_step
        self.renoise = renoise
        self.context_noise = context_noise
        self._last: Tensor | None = None

    @property
    def frames(self) -> int:
        """Frames of the next chunk."""
        return self.cache.frames if self._last is None else self.cache.frames_per_chunk

    def chunk(self, noise: Tensor, *, grad: bool) -> Tensor:
        """The next chunk's x0 from its noise, both [B, `frames`, C, h, w].

        Args:
            grad: build a graph at the exit step; without it the chunk is data.
        """
        self._keep_last()
        self.cache.begin_chunk()
        x = noise
        with torch.no_grad():
            for t, t_next in itertools.pairwise(self.steps[: self.exit_step + 1]):
                x0 = self._x0(x, t, self._data, write=True)
                x = self.schedule.add_noise(x0, self.renoise(x0), self.schedule.sigma(t_next))
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            # With a graph, fresh keys and values are arguments beside the past; else they go to their slot.
            x0 = self._x0(x, self.steps[self.exit_step], self.text, write=not torch.is_grad_enabled())
        self._last = x0.detach()
        return x0

    @torch.no_grad()
    def _keep_last(self) -> None:
        """Leaves the last chunk's keys and values; not before there is somebody to read them."""
        if self._last is None:
            return
        kept, t = self._last, self.context_noise
        if t > 0:
            kept = self.schedule.add_noise(kept, self.renoise(kept), self.schedule.sigma(t))
        self.student.forward_chunk(kept, _timestep(t, kept), self._data, self.cache, write=True)
        self.cache.commit()
        self._last = None

    def _x0(self, x: Tensor, t: float, text: TextContext, *, write: bool) -> Tensor:
        v = self.student.forward_chunk(x, _timestep(t, x), text, self.cache, write=write)
        return FlowSchedule.x0_from_v(x, v, FlowSchedule.sigma(t))


def self_rollout(rollout: Rollout, noise: Tensor, *, grad: bool = True) -> Tensor:
    """The rest of a rollout's video from noise [B, F, C, h, w], standard normal, float32: x0 of that shape.

    Raises:
        ValueError: F is not whole chunks.
    """
    chunks: list[Tensor] = []
    start, frames = 0, noise.shape[1]
    while start < frames:
        x = noise[:, start : start + rollout.frames]
        if x.shape[1] != rollout.frames:
            raise ValueError(f"self_rollout: noise must be whole chunks, {frames} frames end inside of one")
        start += x.shape[1]
        chunks.append(rollout.chunk(x, grad=grad))
    return torch.cat(chunks, dim=1)


def _timestep(t: float, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), float(t), device=x.device)
