"""The teacher's own samples: many steps, guidance, and every frame seeing every other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stream_r1.distill.dmd import velocity
from stream_r1.schedule import FlowSchedule


@torch.no_grad()
def teacher_sample(
    teacher: nn.Module,
    text: Tensor,
    negative: Tensor,
    shape: Sequence[int],
    *,
    schedule: FlowSchedule,
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """Integrate ``dx / dsigma = v`` from noise to video with Euler steps.

    Args:
        teacher: bidirectional; text embeddings [B, L, D], the negative one [1, L, D].
        shape: (F, C, h, w) of a video.
        steps: Euler steps on the schedule's grid.
        guidance: w of ``cond + w (cond - uncond)``: a conventional scale minus 1.

    Returns:
        Latents [B, F, C, h, w], float32.
    """
    batch = len(text)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *shape, generator=generator).to(text.device)
    both = torch.cat([text, negative.expand_as(text)])
    for now, after in itertools.pairwise([*schedule.timesteps(steps), 0.0]):
        t = torch.full((2 * batch,), now, device=x.device)
        cond, uncond = velocity(teacher, torch.cat([x, x]), t, both).chunk(2)
        x = x + (after - now) / 1000 * (cond + guidance * (cond - uncond))
    return x
