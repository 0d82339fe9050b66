"""A call of every op on small tensors, for what has to hold of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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

MASK = ChunkMask(2, 2, window_frames=3, sink_frames=1)


@dataclass(frozen=True)
class OpCall:
    """call(backend, *inputs) -> a result.

    Attributes:
        shapes: of the inputs, for a width (of a head, of a row, of a picture).
        trained: the first so many inputs have gradients.
        floats: inputs that stay float32 whatever the dtype.
        positive: inputs that are no negative numbers.
        backends: with an implementation of their own, beside the reference.
    """

    call: Callable[..., Tensor]
    shapes: Callable[[int], tuple[tuple[int, ...], ...]]
    trained: int = 0
    floats: tuple[int, ...] = ()
    positive: tuple[int, ...] = ()
    backends: tuple[str, ...] = ("cpu",)
    even: bool = False

    def draw(self, width: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        inputs = []
        for place, shape in enumerate(self.shapes(2 * width if self.even else width)):
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            x = x.abs() if place in self.positive else x
            kept = torch.float32 if place in self.floats and dtype != torch.float64 else dtype
            inputs.append(x.to(kept))
        return inputs


def _rotary(backend: str, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    phases = RotaryGrid(q.shape[2] // 2).phases(0, q.shape[1], 1, 1, q.device)
    phases = tuple(phase.to(torch.promote_types(q.dtype, torch.float32)) for phase in phases)
    return torch.cat(qk_norm_rotary(q, k, q_weight, k_weight, *phases, num_heads=2, backend=backend))


def _gradient(backend: str, x: Tensor, fake: Tensor, real: Tensor, w: Tensor, inter: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    return dmd_gradient_(buffer, x, fake, real, w_intra=w, w_inter=inter, backend=backend)


def _intra(backend: str, saliency: Tensor, scores: Tensor) -> Tensor:
    return intra_weights(saliency, scores, backend=backend)


_DMD = lambda w: ((2, 3, 2, 2, w),) * 3 + ((2, 3, 1, 2, w), (2,))  # noqa: E731

OPS: dict[str, OpCall] = {
    "chunk_attention": OpCall(
        lambda backend, q, k, v: chunk_attention(q, k, v, MASK, backend=backend),
        lambda w: ((1, 10, 2, w),) * 3,
        trained=3,
        backends=("cpu", "sdpa"),
    ),
    "cached_chunk_attention": OpCall(
        lambda backend, q, k, v, past_k, past_v: cached_chunk_attention(
            q, k, v, Past(past_k, past_v, False), backend=backend
        ),
        lambda w: ((1, 3, 2, w), (1, 3, 2, w), (1, 3, 2, w), (1, 5, 2, w), (1, 5, 2, w)),
        trained=3,
        backends=("cpu", "sdpa"),
    ),
    "lse": OpCall(
        lambda backend, q, k: cached_chunk_attention(q, k, k, None, return_lse=True, backend=backend)[1],
        lambda w: ((1, 3, 2, w),) * 2,
        trained=2,
        backends=("cpu", "sdpa"),
    ),
    "qk_norm_rotary": OpCall(
        _rotary, lambda w: ((2, 5, 2 * w), (2, 5, 2 * w), (2 * w,), (2 * w,)), trained=4, even=True
    ),
    "modulated_norm": OpCall(
        lambda backend, x, shift, scale: modulated_norm(x, shift, scale, backend=backend),
        lambda w: ((2, 6, w), (2, 3, w), (2, 3, w)),
        trained=3,
    ),
    "gated_add": OpCall(
        lambda backend, x, y, gate: gated_add(x, y, gate, backend=backend),
        lambda w: ((2, 6, w), (2, 6, w), (2, 3, w)),
        trained=3,
    ),
    "rms_norm_silu": OpCall(
        lambda backend, x, weight, before: rms_norm_silu(x, weight, before, backend=backend),
        lambda w: ((2, 6, w), (w,), (2, 2, w)),
        trained=3,
    ),
    "rms_norm": OpCall(
        lambda backend, x, weight: rms_norm(x, weight, backend=backend), lambda w: ((2, 6, w), (w,))
    ),
    "fused_linear": OpCall(
        lambda backend, x, weight, bias: fused_linear(x, [weight], [bias], gelu=True, backend=backend),
        lambda w: ((2, 6, w), (3, w), (3,)),
    ),
    "fused_linear_gated": OpCall(
        lambda backend, x, weight, residual, gate: fused_linear(
            x, [weight], residual=residual, gate=gate, backend=backend
        ),
        lambda w: ((2, 6, w), (3, w), (2, 6, 3), (2, 3, 3)),
    ),
    "region_saliency": OpCall(
        lambda backend, grads: region_saliency(grads, (2, 1, 1), backend=backend),
        lambda w: ((2, 5, 3, 2, w),),
    ),
    "intra_weights": OpCall(_intra, lambda w: ((2, 2, 3, 2, w), (2, 2)), floats=(0, 1), positive=(0,)),
    "dmd_loss": OpCall(
        lambda backend, x, fake, real, w, inter: dmd_loss(
            x, fake, real, w_intra=w, w_inter=inter, backend=backend
        ),
        _DMD,
        trained=1,
        floats=(3, 4),
        positive=(3, 4),
    ),
    "dmd_gradient_": OpCall(_gradient, _DMD, floats=(3, 4), positive=(3, 4)),
}
PAIRS = [(name, backend) for name, op in OPS.items() for backend in op.backends]
