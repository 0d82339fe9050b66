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

from stream_r1.models.transformer import CausalWanTransformer, TextContext
from stream_r1.schedule import FlowSchedule
from stream_r1_kernels import ChunkCache


def self_rollout(
    student: CausalWanTransformer,
    text: TextContext,
    noise: Tensor,
    *,
    schedule: FlowSchedule,
    steps: Sequence[float],
    exit_step: int,
    renoise: Callable[[Tensor], Tensor] = torch.randn_like,
    context_noise: float = 0.0,
    grad: bool = True,
) -> Tensor:
    """The student's video from `noise`.

    Args:
        text: `student.encode_text(...)`; with a graph when its weights should learn.
        noise: [B, F, C, h, w], standard normal; F whole chunks. float32; every chunk starts from its part.
        steps: the student's timesteps, already warped, falling, in (0, 1000].
        exit_step: index of the step whose x0 is returned, for all chunks.
        renoise: fresh noise like the tensor it is given.
        context_noise: timestep of the pass that leaves keys and values for later chunks; 0 is the clean x0.
        grad: build a graph at the exit step; without it the whole rollout is data.

    Returns:
        x0 [B, F, C, h, w].
    """
    if not 0 <= exit_step < len(steps):
        raise ValueError(f"self_rollout: exit_step must be in [0, {len(steps)}), got {exit_step}")
    batch, frames, _, height, width = noise.shape
    cache = student.new_cache(batch, height, width, max_frames=frames)
    data = text.detach()
    chunks: list[Tensor] = []
    start = 0
    while start < frames:
        x = noise[:, start : start + cache.frames]
        if x.shape[1] != cache.frames:
            raise ValueError(f"self_rollout: noise must be whole chunks, {frames} frames end inside of one")
        start += cache.frames
        cache.begin_chunk()
        with torch.no_grad():
            for t, t_next in itertools.pairwise(steps[: exit_step + 1]):
                x0 = _x0(student, x, t, data, cache, write=True)
                x = schedule.add_noise(x0, renoise(x0), schedule.sigma(t_next))
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            # With a graph, fresh keys and values are arguments beside the past; else they go to their slot.
            x0 = _x0(student, x, steps[exit_step], text, cache, write=not torch.is_grad_enabled())
        chunks.append(x0)
        if start < frames:  # nobody reads what the last chunk would leave
            with torch.no_grad():
                kept = x0.detach()
                if context_noise > 0:
                    kept = schedule.add_noise(kept, renoise(kept), schedule.sigma(context_noise))
                student.forward_chunk(kept, _timestep(context_noise, kept), data, cache, write=True)
            cache.commit()
    return torch.cat(chunks, dim=1)


def _x0(
    student: CausalWanTransformer, x: Tensor, t: float, text: TextContext, cache: ChunkCache, *, write: bool
) -> Tensor:
    v = student.forward_chunk(x, _timestep(t, x), text, cache, write=write)
    return FlowSchedule.x0_from_v(x, v, FlowSchedule.sigma(t))


def _timestep(t: float, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), float(t), device=x.device)
