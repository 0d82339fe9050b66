"""Attention beside torch's own and the reference, from the tiny student's sizes to those of Wan 2.1 1.3B

    OMP_NUM_THREADS=1 pytest benchmarks/test_attention.py --benchmark-only

Every implementation is checked before it is timed: its result must agree with that of torch's attention.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.case import DTYPES
from stream_r1.estimate.work import count, total_flops
from stream_r1_kernels import ChunkMask, Past, cached_chunk_attention, chunk_attention

TINY = {  # batch, queries, keys in all, heads, head width
    f"B{batch}-T84-S{keys}-H{heads}-D64": (batch, 84, keys, heads, 64)
    for heads in (4, 5)
    for keys in (84, 168, 252)
    for batch in (1, 8)
}
MIDDLE = {"B1-T512-S1536-H4-D64": (1, 512, 1536, 4, 64)}
LARGE = {
    "B1-T1560-S4680-H12-D128": (1, 1560, 4680, 12, 128),
    "B1-T4680-S14040-H12-D128": (1, 4680, 14040, 12, 128),
}
STREAMS = TINY | MIDDLE | LARGE
SEQUENCES = {  # batch, frames, heads, head width, mask
    "B4-F9-causal": (4, 9, 4, 64, ChunkMask(28, 3)),
    "B4-F9-forcing": (4, 9, 4, 64, ChunkMask(28, 3, teacher_forcing=True)),
    "B1-F21-window6-sink3": (1, 21, 4, 64, ChunkMask(28, 3, window_frames=6, sink_frames=3)),
    "B1-F9-H12-D128-causal": (1, 9, 12, 128, ChunkMask(520, 3)),
    "B1-F9-H12-D128-window6": (1, 9, 12, 128, ChunkMask(520, 3, window_frames=6)),
    "B1-F9-H12-D128-window3-sink3": (1, 9, 12, 128, ChunkMask(520, 3, window_frames=3, sink_frames=3)),
}


def sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, attn_mask=attn_mask).transpose(1, 2)


def compiled_flex(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, per: int) -> Callable[[], Tensor]:
    """`visible`: [query frames, keys]; `per`: tokens a frame."""
    torch._dynamo.reset()  # past a few specialisations of one function dynamo runs it eagerly, without a word
    tokens = visible.shape[1]

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[query // per, key]

    blocks = create_block_mask(sees, None, None, tokens, tokens, device="cpu")
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda: flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks).transpose(1, 2)


def with_grads(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))


def projected(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v [B, T, H, D] as slices of one fused projection."""
    return torch.randn(batch, tokens, 3, heads, width).to(dtype).unbind(2)


def heads_together(x: Tensor) -> Tensor:
    """[B, T, H, D] that lies in memory as [B, H, T, D], which torch's attention likes best."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(x.requires_grad)


def check_and_time(benchmark: Callable, ours: Callable, plain: Callable, timed: Callable, q: Tensor) -> None:
    """Refuses to time an implementation that disagrees with the plain one. Ours is what must be computed."""
    tolerance = 32 * torch.finfo(q.dtype).eps
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (timed(), plain())), strict=True):
        scale = b.float().abs().max().item()
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * max(scale, 1.0))
    benchmark.extra_info.update(  # type: ignore[attr-defined]
        dtype=str(q.dtype).removeprefix("torch."), shape=list(q.shape), flops=total_flops(count(ours))
    )
    benchmark(timed)


# The reference's scores take gigabytes at the large sizes.
@pytest.mark.parametrize(
    ("size", "implementation"),
    [(size, name) for size in STREAMS for name in ("ours", "sdpa")]
    + [(size, "reference") for size in STREAMS if size not in LARGE],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(max_time=0.3, min_rounds=3)
def test_sampling_attention(benchmark: Callable, size: str, dtype: str, implementation: str) -> None:
    """A chunk against everything that it sees; torch finds its keys contiguous a head."""
    benchmark.group = f"cached_chunk_attention forward {size} {dtype}"  # type: ignore[attr-defined]
    batch, queries, keys, heads, width = STREAMS[size]
    q, _, _ = projected(batch, queries, heads, width, DTYPES[dtype])
    past = Past(*torch.randn(2, batch, keys, heads, width).to(DTYPES[dtype]), True)
    ours = partial(cached_chunk_attention, q, None, None, past)
    baselines = {
        "ours": ours,
        "reference": partial(ours, backend="reference"),
        "sdpa": partial(sdpa, *(heads_together(x) for x in (q, past.k, past.v))),
    }
    with torch.no_grad():
        check_and_time(benchmark, ours, baselines["sdpa"], baselines[implementation], q)


@pytest.mark.parametrize("implementation", ["ours", "reference", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [*(size for size in TINY if "-H4-" in size), *MIDDLE])
@pytest.mark.benchmark(max_time=0.3, min_rounds=5)
def test_training_attention(benchmark: Callable, size: str, dtype: str, implementation: str) -> None:
    """Forward and backward of a chunk against a past without gradients."""
    benchmark.group = f"cached_chunk_attention forward + backward {size} {dtype}"  # type: ignore[attr-defined]
    batch, queries, keys, heads, width = STREAMS[size]
    q, k, v = (x.detach().requires_grad_() for x in projected(batch, queries, heads, width, DTYPES[dtype]))
    past = Past(*torch.randn(2, batch, keys - queries, heads, width).to(DTYPES[dtype]), False)

    def run(backend: str) -> tuple[Tensor, ...]:
        return with_grads(cached_chunk_attention(q, k, v, past, backend=backend), [q, k, v])

    def baseline() -> tuple[Tensor, ...]:
        return with_grads(sdpa(q, torch.cat([past.k, k], 1), torch.cat([past.v, v], 1)), [q, k, v])

    timed = {"ours": partial(run, "cpu"), "reference": partial(run, "reference"), "sdpa": baseline}
    check_and_time(benchmark, timed["ours"], baseline, timed[implementation], q)


# FlexAttention has no backward on a CPU. The two that know the mask are slow: at the large size alone.
@pytest.mark.parametrize(
    ("size", "dtype", "train", "implementation"),
    [
        pytest.param(
            size, dtype, train, name, id=f"{size}-{dtype}-{'training' if train else 'forward'}-{name}"
        )
        for size in SEQUENCES
        for dtype in ("float32", "bfloat16")
        for train in (False, True)
        for name in (
            "ours",
            "sdpa of each chunk",
            *(("sdpa with a mask", "compiled flex_attention") if "H12" in size and not train else ()),
        )
    ],
)
@pytest.mark.benchmark(max_time=0.3, min_rounds=3)
def test_chunk_attention(
    benchmark: Callable, size: str, dtype: str, train: bool, implementation: str
) -> None:
    """The first baseline is a loop of torch's attention over chunks, each against the keys that it sees."""
    benchmark.group = f"chunk_attention {'forward + backward' if train else 'forward'} {size} {dtype}"  # type: ignore[attr-defined]
    batch, frames, heads, width, mask = SEQUENCES[size]
    tokens = frames * mask.tokens_per_frame * (2 if mask.teacher_forcing else 1)
    inputs = [x.detach().requires_grad_(train) for x in projected(batch, tokens, heads, width, DTYPES[dtype])]
    q, k, v = (heads_together(x) for x in inputs)

    def seen(keys: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
        parts = [keys[:, first:last] for first, last in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def of_each_chunk() -> Tensor:
        return torch.cat(
            [sdpa(q[:, a:b], seen(k, ranges), seen(v, ranges)) for a, b, ranges in mask.blocks(tokens)], 1
        )

    timed = {
        "ours": lambda: (
            with_grads(chunk_attention(*inputs, mask), inputs) if train else chunk_attention(*inputs, mask)
        ),
        "sdpa of each chunk": lambda: with_grads(of_each_chunk(), [q, k, v]) if train else of_each_chunk(),
    }
    if implementation == "sdpa with a mask":
        timed[implementation] = partial(sdpa, q, k, v, attn_mask=mask.visible(tokens))
    if implementation == "compiled flex_attention":
        per = mask.tokens_per_frame
        timed[implementation] = compiled_flex(q, k, v, mask.visible(tokens)[::per], per)
    plain = timed["sdpa of each chunk"]
    check_and_time(benchmark, timed["ours"], plain, timed[implementation], q)
