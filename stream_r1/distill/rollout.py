"""Self-rollout: the student makes a video chunk by chunk, as it will when sampling, and learns from it.

    chunk 0: steps before the exit (no grad) -> exit step (grad) -> x0 -> clean pass (no grad) leaves K, V
    chunk 1: the same, reading what chunk 0 left ...

Every chunk leaves at the same exit step. Source: Self Forcing (2506.08009).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stream_r1.chunk_loop import ChunkLoop, StudentPasses
from stream_r1.models.contexts import TextContext
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule


def begin_rollout(
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
) -> ChunkLoop:
    """A chunk loop whose chunks all leave at one step.

    Args:
        text: `student.encode_text(...)`; with a graph when its weights should learn.
        size: batch, height and width of the latents.
        max_frames: of the video. A student with a window makes any number of frames in the same memory; where
            they fit in it, no chunk's past has to be copied for the backward.
        steps: the student's timesteps, already warped, falling, in (0, 1000].
        exit_step: index of the step whose x0 a chunk is, for all chunks.
        renoise: fresh noise like the tensor it is given.
        context_noise: timestep of the cache update; 0 is the clean x0.
    """
    if not 0 <= exit_step < len(steps):
        raise ValueError(f"begin_rollout: exit_step must be in [0, {len(steps)}), got {exit_step}")
    cache = student.new_cache(*size, max_frames=max_frames)
    return ChunkLoop(
        StudentPasses(student, cache, text, share_times=False),
        schedule=schedule,
        steps=steps[: exit_step + 1],
        renoise=lambda chunk, step, x: renoise(x),
        context_noise=context_noise,
    )


def self_rollout(rollout: ChunkLoop, noise: Tensor, *, grad: bool = True) -> Tensor:
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
        chunks.append(rollout.denoise(x, grad=grad))
    return torch.cat(chunks, dim=1)
