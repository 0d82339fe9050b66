"""Every op at several sizes, each as a function of its tensors: the same call in any dtype, anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stream_r1_kernels import (
    ChunkMask,
    Past,
    RotaryGrid,
    cached_chunk_attention,
    chunk_attention,
    dmd_gradient_,
    dmd_loss,
    fused_linear,
    gated_add,
    intra_weights,
    modulated_norm,
    qk_norm_rotary,
    region_saliency,
    rms_norm,
    rms_norm_silu,
)


@dataclass(frozen=True)
class OpCase:
    """`call(*tensors, backend=...)`; the first `differentiable` of the tensors get gradients."""

    op: str
    name: str
    call: Callable[..., Any]
    shapes: Sequence[tuple[int, ...]]
    differentiable: int = 0
    pieces: int = 1
    positive: bool = False  # tensors hold values in (0, 1)

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """On the CPU, the same ones each time."""
        generator = torch.Generator().manual_seed(0)
        draw = torch.rand if self.positive else torch.randn
        return [draw(shape, generator=generator).to(dtype) for shape in self.shapes]

    @property
    def head_dim(self) -> int | None:
        return self.shapes[0][-1] if "attention" in self.op else None


def _past(q: Tensor, past_k: Tensor, past_v: Tensor, *, backend: str) -> Any:
    return cached_chunk_attention(q, None, None, Past(past_k, past_v, True), return_lse=True, backend=backend)


def _segments(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, *, backend: str) -> Any:
    past = Past(past_k, past_v, False)
    return cached_chunk_attention(q, k, v, past, return_lse=True, backend=backend)


def _rotary(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *, backend: str, heads: int) -> Any:
    grid = RotaryGrid(q.shape[-1] // heads)
    phases = [
        phase.to(q.dtype if q.dtype == torch.float64 else torch.float32) for phase in grid.phases(3, 2, 2, 3)
    ]
    phases = [phase.to(q.device) for phase in phases]
    return qk_norm_rotary(q, k, q_weight, k_weight, *phases, num_heads=heads, backend=backend)


def _linear(x: Tensor, one: Tensor, other: Tensor, *biases: Tensor, backend: str) -> Tensor:
    return fused_linear(x, [one, other], biases, gelu=True, backend=backend)


def _gradient(buffer: Tensor, x: Tensor, fake: Tensor, cond: Tensor, *, backend: str) -> Tensor:
    return dmd_gradient_(buffer.clone(), x, fake, cond, scale=0.5, backend=backend)


def _weighted_loss(x: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, *, backend: str) -> Tensor:
    frames = torch.arange(x.shape[1], device=x.device) > 0
    weights = (1.0 + frames).to(torch.float32).view(1, -1, 1, 1, 1)
    return dmd_loss(x, fake, cond, uncond, w_intra=weights, backend=backend)


MASKS = {
    "window and sink": ChunkMask(7, 3, window_frames=6, sink_frames=2),
    "first frame alone": ChunkMask(5, 2, first_chunk_frames=1),
    "teacher forcing": ChunkMask(6, 2, window_frames=4, sink_frames=1, teacher_forcing=True),
}
LATENTS = (2, 3, 4, 6, 10)


def attention_cases() -> list[OpCase]:
    found = []
    for width in (64, 128, 40):
        for name, mask in MASKS.items():
            frames = 7 * (2 if mask.teacher_forcing else 1)
            shape = (2, frames * mask.tokens_per_frame, 3, width)
            call = partial(chunk_attention, mask=mask)
            found.append(OpCase("chunk_attention", f"{name}, heads of {width}", call, [shape] * 3, 3))
        past, fresh = (2, 150, 3, width), (2, 70, 3, width)
        found += [
            OpCase("cached_chunk_attention", f"one piece, heads of {width}", _past, [fresh, past, past]),
            OpCase(
                *("cached_chunk_attention", f"past and fresh, heads of {width}", _segments),
                *([fresh] * 3 + [past] * 2, 3, 2),
            ),
        ]
    one, many = (1, 1, 1, 64), (1, 3001, 1, 64)
    return [*found, OpCase("cached_chunk_attention", "one query, many keys", _past, [one, many, many])]


def row_cases() -> list[OpCase]:
    found = []
    for width in (48, 256, 1536):
        x, modulation, weight = (2, 12, width), (2, 3, width), (width,)
        rotary = partial(_rotary, heads=2)
        found += [
            OpCase("modulated_norm", f"{width} wide", modulated_norm, [x, modulation, modulation], 3),
            OpCase("gated_add", f"{width} wide", gated_add, [x, x, modulation], 3),
            OpCase("qk_norm_rotary", f"{width} wide", rotary, [x, x, weight, weight], 4),
            OpCase("rms_norm", f"{width} wide", rms_norm, [x, weight]),
            OpCase("rms_norm_silu", f"{width} wide", rms_norm_silu, [x, weight, (2, 5, width)], 3),
        ]
    shapes = [(2, 12, 48), (20, 48), (30, 48), (20,), (30,)]
    return [*found, OpCase("fused_linear", "two side by side", _linear, shapes)]


def distill_cases() -> list[OpCase]:
    saliency = partial(region_saliency, latent_shape=(3, 2, 4))
    return [
        OpCase("region_saliency", "3 axes", saliency, [(3, 2, 9, 3, 16, 32)]),
        OpCase("intra_weights", "3 axes", intra_weights, [(3, 2, 5, 6, 10), (2, 3)], positive=True),
        OpCase("dmd_loss", "guided", dmd_loss, [LATENTS] * 4, 1),
        OpCase("dmd_loss", "weighted", _weighted_loss, [LATENTS] * 4, 1),
        OpCase("dmd_gradient_", "into a buffer", _gradient, [LATENTS] * 4),
    ]


CASES = [*attention_cases(), *row_cases(), *distill_cases()]
