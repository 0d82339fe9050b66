"""The attention ops against float64, over generated shapes, strides, dtypes, masks and scales.

STREAM_R1_EXAMPLES=2000 looks longer.
"""

import os
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stream_r1_kernels import ChunkMask, Past, cached_chunk_attention, chunk_attention
from stream_r1_kernels.attention import reference

EXAMPLES = int(os.environ.get("STREAM_R1_EXAMPLES", "100"))
thorough = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
widths = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 63, 64, 80, 128, 131])
scales = st.sampled_from([None, 0.0, 1.0, -0.4, 0.05])
layouts = st.sampled_from(["contiguous", "fused", "heads first", "every other token", "every other element"])


def laid_out(layout: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[B, T, H, D] random values, in one of the layouts that callers have."""
    b, t, h, d = shape
    if layout == "fused":
        return torch.randn(b, t, 3, h, d).to(dtype)[:, :, 1]
    if layout == "heads first":
        return torch.randn(b, h, t, d).to(dtype).transpose(1, 2)
    if layout == "every other token":
        return torch.randn(b, 2 * t, h, d).to(dtype)[:, ::2]
    if layout == "every other element":
        return torch.randn(b, t, h, 2 * d).to(dtype)[..., ::2]
    return torch.randn(b, t, h, d).to(dtype)


def torchs_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, attn_mask=visible, scale=scale).transpose(1, 2)


def worst(a: Tensor, exact: Tensor) -> float:
    return (a.double() - exact).abs().max().item() if a.numel() else 0.0


class Exactness:
    """At most twice torch's error, a unit in the last place, and what rounding the scores to float32 costs.

    The unit is that of the largest result, of 1 where all are smaller, or of the largest of the terms that
    add up to a gradient. A score is a sum of products: rounded, it is known to an epsilon of the sum of their
    magnitudes, and so is the logarithm of a weight.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> None:
        self.score = self.terms = 1.0
        if q.numel() and k.numel():
            q, k, v, grad = (x.detach().double() for x in (q, k, v, grad))
            self.score += abs(scale) * torch.einsum("bqhd,bkhd->bhqk", q.abs(), k.abs()).max().item()
            grad_weight = torch.einsum("bqhd,bkhd->bhqk", grad, v).abs().max().item()
            self.terms += abs(scale) * grad_weight * max(q.abs().max().item(), k.abs().max().item())

    def check(self, ours: Tensor, baseline: Tensor, exact: Tensor, terms: float = 1.0) -> None:
        assert ours.shape == exact.shape
        assert ours.dtype == baseline.dtype
        largest = max(terms, exact.abs().max().item() if exact.numel() else 0.0)
        rounding = torch.finfo(ours.dtype).eps + torch.finfo(torch.float32).eps * self.score
        assert worst(ours, exact) <= 2 * worst(baseline, exact) + rounding * largest

    def check_gradients(
        self, ours: Sequence[Tensor], baselines: Sequence[Tensor], exact: Sequence[Tensor]
    ) -> None:
        for a, b, c in zip(ours, baselines, exact, strict=True):
            self.check(a, b, c, self.terms)


@thorough
@given(
    batch=st.integers(0, 2),
    queries=st.integers(0, 140),
    heads=st.integers(1, 3),
    width=widths,
    fresh=st.integers(1, 110),
    past=st.none() | st.integers(0, 420),
    dtype=dtypes,
    q_layout=layouts,
    layout=layouts,
    scale=scales,
)
def test_cached_chunk_attention(
    batch: int,
    queries: int,
    heads: int,
    width: int,
    fresh: int,
    past: int | None,
    dtype: torch.dtype,
    q_layout: str,
    layout: str,
    scale: float | None,
) -> None:
    torch.manual_seed(queries + width)
    q = laid_out(q_layout, (batch, queries, heads, width), dtype).requires_grad_()
    k, v = (laid_out(layout, (batch, fresh, heads, width), dtype).requires_grad_() for _ in range(2))
    before = [laid_out(layout, (batch, past or 0, heads, width), dtype) for _ in range(2)]
    grad = laid_out(layout, q.shape, dtype)
    out, lse = cached_chunk_attention(
        q, k, v, None if past is None else Past(*before, False), scale=scale, return_lse=True, backend="cpu"
    )
    grads = torch.autograd.grad(out, (q, k, v), grad)

    factor = width**-0.5 if scale is None else scale
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact, exact_lse = reference.cached_chunk_attention(*doubles, *(x.double() for x in before), factor)
    exact_grads = torch.autograd.grad(exact, doubles, grad.double())
    keys, values = torch.cat([before[0], k], 1), torch.cat([before[1], v], 1)
    baseline = torchs_attention(q, keys, values, factor)
    baseline_grads = torch.autograd.grad(baseline, (q, k, v), grad)
    _, baseline_lse = reference.cached_chunk_attention(q, k, v, *before, factor)
    exactness = Exactness(q, keys, values, grad, factor)
    exactness.check(out, baseline, exact)
    exactness.check(lse, baseline_lse, exact_lse)
    exactness.check_gradients(grads, baseline_grads, exact_grads)


masks = st.builds(
    lambda tokens, chunk, extra, sink, first, teacher: ChunkMask(
        tokens, chunk, None if extra is None else max(chunk, first or 0) + extra, sink, first, teacher
    ),
    st.integers(1, 40),
    st.integers(1, 3),
    st.none() | st.integers(0, 2),
    st.integers(0, 3),
    st.none() | st.integers(1, 3),
    st.booleans(),
)


@thorough
@given(
    mask=masks,
    frames=st.integers(1, 7),
    batch=st.integers(0, 2),
    heads=st.integers(1, 2),
    width=widths,
    dtype=dtypes,
    layout=layouts,
    scale=scales,
)
def test_chunk_attention(
    mask: ChunkMask,
    frames: int,
    batch: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
    layout: str,
    scale: float | None,
) -> None:
    torch.manual_seed(frames + width)
    tokens = frames * mask.tokens_per_frame * (2 if mask.teacher_forcing else 1)
    q, k, v = (laid_out(layout, (batch, tokens, heads, width), dtype).requires_grad_() for _ in range(3))
    grad = laid_out(layout, q.shape, dtype)
    out = chunk_attention(q, k, v, mask, scale=scale, backend="cpu")
    grads = torch.autograd.grad(out, (q, k, v), grad)

    factor = width**-0.5 if scale is None else scale
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = reference.chunk_attention(*doubles, mask.table(tokens), factor)
    baseline = torchs_attention(q, k, v, factor, mask.visible(tokens))
    exactness = Exactness(q, k, v, grad, factor)
    exactness.check(out, baseline, exact)
    baseline_grads = torch.autograd.grad(baseline, (q, k, v), grad)
    exactness.check_gradients(grads, baseline_grads, torch.autograd.grad(exact, doubles, grad.double()))


@thorough
@given(keys=st.integers(1, 500), queries=st.integers(1, 100), width=widths, dtype=dtypes, data=st.data())
def test_order_and_place_of_keys_do_not_matter(
    keys: int, queries: int, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    torch.manual_seed(keys)
    q = torch.randn(1, queries, 2, width).to(dtype)
    k, v = torch.randn(2, 1, keys, 2, width).to(dtype)
    cut = data.draw(st.integers(0, keys))
    order = torch.randperm(keys)
    whole, lse = cached_chunk_attention(q, None, None, Past(k, v, True), return_lse=True)
    past = Past(k[:, order[:cut]], v[:, order[:cut]], False)
    parts, lse_parts = cached_chunk_attention(q, k[:, order[cut:]], v[:, order[cut:]], past, return_lse=True)
    exactness = Exactness(q, k, v, torch.zeros_like(q), width**-0.5)
    exactness.check(parts, whole, whole.double(), v.abs().max().item())
    exactness.check(lse_parts, lse, lse.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_of_several_tiles_and_blocks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 450, 2, 128).to(dtype).requires_grad_() for _ in range(3))
    past = torch.randn(2, 1, 333, 2, 128).to(dtype)
    grad = torch.randn_like(q)
    out = cached_chunk_attention(q, k, v, Past(*past, False))
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact, _ = reference.cached_chunk_attention(*doubles, *past.double(), 128**-0.5)
    baseline = torchs_attention(q, torch.cat([past[0], k], 1), torch.cat([past[1], v], 1), 128**-0.5)
    exactness = Exactness(q, k, v, grad, 128**-0.5)
    exactness.check(out, baseline, exact)
    exactness.check_gradients(
        torch.autograd.grad(out, (q, k, v), grad),
        torch.autograd.grad(baseline, (q, k, v), grad),
        torch.autograd.grad(exact, doubles, grad.double()),
    )


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_heads_are_shared_by_threads(dtype: torch.dtype) -> None:
    """With fewer heads than threads the keys are dealt out: the same to rounding, and bit for bit again."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 300, 1, 64).to(dtype).requires_grad_() for _ in range(3))
    mask = ChunkMask(20, 3, window_frames=6, sink_frames=2)

    def run(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        out = chunk_attention(q, k, v, mask)
        return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

    alone, shared, again = run(1), run(3), run(3)
    for a, b, c in zip(alone, shared, again, strict=True):
        assert torch.equal(b, c)
        unit = torch.finfo(dtype).eps * max(1.0, a.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=4 * unit)
