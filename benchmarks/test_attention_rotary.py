"""Attention beside its reference and torch's own attention, tiny and larger

    pytest benchmarks/test_attention_rotary.py --benchmark-only

Every case is checked before it is timed: our result must agree with the rival's.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stream_r1_kernels import (
    ChunkMask,
    Past,
    cached_chunk_attention,
    chunk_attention,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STREAMS = {  # batch, queries, keys in all, heads, head width
    "B1-T84-S84-H4-D64": (1, 84, 84, 4, 64),
    "B1-T84-S252-H4-D64": (1, 84, 252, 4, 64),
    "B8-T84-S252-H4-D64": (8, 84, 252, 4, 64),
    "B1-T512-S1536-H4-D64": (1, 512, 1536, 4, 64),
}
SEQUENCES = {  # batch, frames, heads, head width, mask
    "B4-F9-causal": (4, 9, 4, 64, ChunkMask(28, 3)),
    "B4-F9-forcing": (4, 9, 4, 64, ChunkMask(28, 3, teacher_forcing=True)),
    "B1-F21-window6-sink3": (1, 21, 4, 64, ChunkMask(28, 3, window_frames=6, sink_frames=3)),
}


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, attn_mask=visible).transpose(1, 2)


def with_grads(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))


def projected(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v [B, T, H, D] as slices of one fused projection."""
    return torch.randn(batch, tokens, 3, heads, width).to(dtype).unbind(2)


def check_and_time(
    benchmark: Callable, ours: Callable, rival: Callable, timed: Callable, dtype: torch.dtype
) -> None:
    tolerance = 32 * torch.finfo(dtype).eps
    mine, theirs = ours(), rival()
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (mine, theirs)), strict=True):
        scale = b.float().abs().max().item()
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * max(scale, 1.0))
    benchmark(timed)


@pytest.mark.parametrize("implementation", ["ours", "reference", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", STREAMS)
@pytest.mark.benchmark(max_time=0.3, min_rounds=5)
def test_sampling_attention(benchmark: Callable, size: str, dtype: str, implementation: str) -> None:
    benchmark.group = f"cached_chunk_attention forward {size} {dtype}"  # type: ignore[attr-defined]
    batch, queries, keys, heads, width = STREAMS[size]
    q, _, _ = projected(batch, queries, heads, width, DTYPES[dtype])
    past = Past(*torch.randn(2, batch, keys, heads, width).to(DTYPES[dtype]), True)
    ours = partial(cached_chunk_attention, q, None, None, past)
    rivals = {
        "ours": ours,
        "reference": partial(ours, backend="reference"),
        "sdpa": partial(sdpa, q, past.k, past.v),
    }
    with torch.no_grad():
        check_and_time(benchmark, ours, rivals["sdpa"], rivals[implementation], DTYPES[dtype])


@pytest.mark.parametrize("implementation", ["ours", "reference", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", STREAMS)
@pytest.mark.benchmark(max_time=0.3, min_rounds=5)
def test_training_attention(benchmark: Callable, size: str, dtype: str, implementation: str) -> None:
    """Forward and backward of a chunk against a past without gradients."""
    benchmark.group = f"cached_chunk_attention forward + backward {size} {dtype}"  # type: ignore[attr-defined]
    batch, queries, keys, heads, width = STREAMS[size]
    q, k, v = (x.detach().requires_grad_() for x in projected(batch, queries, heads, width, DTYPES[dtype]))
    past = Past(*torch.randn(2, batch, keys - queries, heads, width).to(DTYPES[dtype]), False)

    def run(backend: str) -> tuple[Tensor, ...]:
        return with_grads(cached_chunk_attention(q, k, v, past, backend=backend), [q, k, v])

    def rival() -> tuple[Tensor, ...]:
        return with_grads(sdpa(q, torch.cat([past.k, k], 1), torch.cat([past.v, v], 1)), [q, k, v])

    timed = {"ours": partial(run, "cpu"), "reference": partial(run, "reference"), "sdpa": rival}
    check_and_time(benchmark, timed["ours"], rival, timed[implementation], DTYPES[dtype])


@pytest.mark.parametrize("implementation", ["ours", "reference", "sdpa"])
@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SEQUENCES)
@pytest.mark.benchmark(max_time=0.3, min_rounds=5)
def test_chunk_attention(
    benchmark: Callable, size: str, dtype: str, train: bool, implementation: str
) -> None:
    benchmark.group = f"chunk_attention {'forward + backward' if train else 'forward'} {size} {dtype}"  # type: ignore[attr-defined]
    batch, frames, heads, width, mask = SEQUENCES[size]
    visible = (
        mask.visible(frames)
        .repeat_interleave(mask.tokens_per_frame, 0)
        .repeat_interleave(mask.tokens_per_frame, 1)
    )
    inputs = [
        x.detach().requires_grad_(train)
        for x in projected(batch, visible.shape[0], heads, width, DTYPES[dtype])
    ]

    def finish(out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return with_grads(out, inputs) if train else out

    timed = {
        "ours": lambda: finish(chunk_attention(*inputs, mask)),
        "reference": lambda: finish(chunk_attention(*inputs, mask, backend="reference")),
        "sdpa": lambda: finish(sdpa(*inputs, visible)),
    }
    check_and_time(benchmark, timed["ours"], timed["sdpa"], timed[implementation], DTYPES[dtype])
