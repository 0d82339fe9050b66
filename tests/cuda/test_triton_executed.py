"""Triton's attention, forward and backward: what Triton compiles for sm_80 now, run on real tensors, against
float64. STREAM_R1_EXAMPLES=300 draws that many masks instead of a few.
"""

from __future__ import annotations

import os
import random

import exact
import pytest
import torch
from attention_inputs import MASKS, OWN_MASKS, Sizes, fused, visible_tokens
from torch import Tensor
from triton_machine import TritonMachine

from stream_r1_kernels import ChunkMask, RangeMask
from stream_r1_kernels.attention import Past, api, triton_attention

BF16, FP16 = torch.bfloat16, torch.float16


def leaves(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    """q, k and v as slices of one projection, to take gradients of."""
    return [x.requires_grad_() for x in fused(batch, tokens, heads, head_dim, dtype)]


def by_hand(
    inputs: list[Tensor],
    past: tuple[Tensor, Tensor] | None,
    upstream: list[Tensor],
    scale: float,
    visible: Tensor | None,
    rounded: bool,
) -> list[Tensor]:
    """out, lse and the gradients of q, k and v in float64.

    rounded: weights and slopes are rounded to the inputs' dtype before they are multiplied, as tensor cores
        need them, and so are the results.
    """
    dtype = inputs[0].dtype

    def cut(x: Tensor) -> Tensor:
        return x.to(dtype).double() if rounded else x

    q, k, v, up = (x.detach().double() for x in (*inputs, upstream[0]))
    old = 0
    if past is not None:
        old = past[0].shape[1]
        k, v = torch.cat((past[0].double(), k), 1), torch.cat((past[1].double(), v), 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    highest, lse = scores.amax(-1, keepdim=True), scores.logsumexp(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", cut((scores - highest).exp()), v)
    out = cut(out / (lse[..., None] - highest).exp().transpose(1, 2))
    p = (scores - lse[..., None]).exp()
    delta = (out * up).sum(-1).transpose(1, 2) - upstream[1].double()  # [B, H, T]
    slope = p * (torch.einsum("bqhd,bkhd->bhqk", up, v) - delta[..., None])
    grad_q = torch.einsum("bhqk,bkhd->bqhd", cut(slope), k) * scale
    grad_k = torch.einsum("bhqk,bqhd->bkhd", cut(slope), q)[:, old:] * scale
    grad_v = torch.einsum("bhqk,bqhd->bkhd", cut(p), up)[:, old:]
    results = [out, lse, grad_q, grad_k, grad_v]
    if not rounded:
        return results
    return [x.float() if i == 1 else x.to(dtype) for i, x in enumerate(results)]


def check(
    ours: list[Tensor],
    inputs: list[Tensor],
    past: tuple[Tensor, Tensor] | None,
    upstream: list[Tensor],
    scale: float,
    visible: Tensor | None = None,
) -> None:
    true = by_hand(inputs, past, upstream, scale, visible, rounded=False)
    theirs = by_hand(inputs, past, upstream, scale, visible, rounded=True)
    for a, b, c in zip(ours, true, theirs, strict=True):
        exact.assert_close(a, b, c)


def cached(
    machine: TritonMachine,
    inputs: list[Tensor],
    past: tuple[Tensor, Tensor] | None,
    upstream: list[Tensor],
    scale: float,
    **options: object,
) -> list[Tensor]:
    with machine.running(**options):
        results = triton_attention.cached_chunk_attention(*inputs, *(past or (None, None)), scale)
        return [*(x.detach() for x in results), *torch.autograd.grad(results, inputs, upstream)]


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (BF16, Sizes(1, 1, 0, 1, 1, 64)),  # one token
        (BF16, Sizes(2, 150, 70, 200, 2, 64)),  # two segments, ragged everywhere
        (BF16, Sizes(2, 48, 144, 48, 1, 128)),  # a window while it fills
        (BF16, Sizes(1, 128, 64, 128, 1, 128)),  # whole tiles
        (FP16, Sizes(1, 70, 30, 70, 2, 64)),
        (FP16, Sizes(1, 33, 0, 65, 1, 128)),
    ],
)
def test_cached_chunk_attention(triton_machine: TritonMachine, dtype: torch.dtype, sizes: Sizes) -> None:
    q, k, v, *past = sizes.draw(dtype)
    old = tuple(past) if sizes.past else None
    inputs = [x.requires_grad_() for x in (q, k, v)]
    upstream = [torch.randn(q.shape).to(dtype), torch.randn(sizes.batch, sizes.heads, sizes.queries)]
    scale = sizes.head_dim**-0.5
    ours = cached(triton_machine, inputs, old, upstream, scale, seed=sizes.queries)
    names = [launch.name for launch in triton_machine.launches]
    assert names == ["forward", "grad_queries", "grad_keys"]
    check(ours, inputs, old, upstream, scale)


def test_the_order_of_warps_and_copies_does_not_matter(triton_machine: TritonMachine) -> None:
    torch.manual_seed(0)
    inputs = leaves(1, 140, 1, 64)
    old = tuple(torch.randn(1, 90, 1, 64).to(BF16) for _ in "kv")
    upstream = [torch.randn(1, 140, 1, 64).to(BF16), torch.randn(1, 1, 140)]
    results = [
        cached(triton_machine, inputs, old, upstream, 0.125, seed=seed, early_copies=seed == 2)
        for seed in range(3)
    ]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("mask", "frames"), list(zip(MASKS, (7, 13, 7, 5, 8), strict=True)))
def test_chunk_attention(triton_machine: TritonMachine, mask: ChunkMask, frames: int) -> None:
    check_mask(triton_machine, mask, frames, heads=2, seed=frames)


def draw_mask(draw: random.Random) -> tuple[ChunkMask, int]:
    """Any mask, and frames for it."""
    tokens, chunk, first = draw.choice([3, 7, 16, 20, 33]), draw.randint(1, 4), draw.choice([None, 1, 2, 5])
    window = draw.choice([None, *(max(chunk, first or 0) + more for more in (0, 1, 2, 5))])
    mask = ChunkMask(tokens, chunk, window, draw.choice([0, 1, 2, 3, 6]), first, draw.random() < 0.5)
    return mask, draw.randint(1, min(12, 250 // tokens))


@pytest.mark.parametrize("seed", range(int(os.environ.get("STREAM_R1_EXAMPLES", "6"))))
def test_any_mask(triton_machine: TritonMachine, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """In smaller blocks than `CONFIGS`, of which a chunk has several."""
    for name in ("forward", "grad_queries", "grad_keys"):
        small = {8: triton_attention.Config(32, 32, 2, 2)}
        monkeypatch.setitem(triton_attention.CONFIGS, (name, 64), small)
    check_mask(triton_machine, *draw_mask(random.Random(seed)), heads=1, seed=seed)


def check_mask(machine: TritonMachine, mask: ChunkMask, frames: int, *, heads: int, seed: int) -> None:
    torch.manual_seed(0)
    visible = visible_tokens(mask, frames)
    tokens = len(visible)
    inputs = leaves(1, tokens, heads, 64)
    upstream = [torch.randn(1, tokens, heads, 64).to(BF16), torch.zeros(1, heads, tokens)]
    with machine.running(seed=seed, early_copies=seed % 3 == 2):
        out = triton_attention.chunk_attention(*inputs, mask.table(tokens), 0.125)
        grads = torch.autograd.grad(out, inputs, upstream[0])
    true, theirs = (
        by_hand(inputs, None, upstream, 0.125, visible, rounded=rounded) for rounded in (False, True)
    )
    for a, b, c in zip([out.detach(), *grads], [true[0], *true[2:]], [theirs[0], *theirs[2:]], strict=True):
        exact.assert_close(a, b, c)


@pytest.mark.parametrize(("mask", "tokens"), OWN_MASKS)
def test_masks_of_ones_own(triton_machine: TritonMachine, mask: RangeMask, tokens: int) -> None:
    torch.manual_seed(0)
    visible, inputs = mask.visible(tokens), leaves(1, tokens, 1, 64)
    seeing, upstream = visible.any(1), torch.randn(1, tokens, 1, 64).to(BF16)
    with triton_machine.running():
        out = triton_attention.chunk_attention(*inputs, mask.table(tokens), 0.125)
        grad_q, *grads = torch.autograd.grad(out, inputs, upstream)
    q, k, v = inputs
    ours = [out.detach()[:, seeing], grad_q[:, seeing], *grads]
    up = [upstream[:, seeing], torch.zeros(1, 1, int(seeing.sum()))]
    true, theirs = (
        by_hand([q[:, seeing], k, v], None, up, 0.125, visible[seeing], rounded=rounded)
        for rounded in (False, True)
    )
    for a, b, c in zip(ours, [true[0], *true[2:]], [theirs[0], *theirs[2:]], strict=True):
        exact.assert_close(a, b, c)
    assert not out[:, ~seeing].any()
    assert not grad_q[:, ~seeing].any()


def test_what_is_not_visible_is_not_read(triton_machine: TritonMachine) -> None:
    """Keys that a chunk can't see, and queries that can't see a key, are NaN, and nothing comes of it."""
    torch.manual_seed(0)
    mask, n = ChunkMask(20, 2, window_frames=3, sink_frames=1), 20
    q, k, v = leaves(1, 8 * n, 1, 64)
    hidden = ~mask.visible(8 * n)[-1]  # to the last chunk
    assert hidden.sum() == 4 * n
    with torch.no_grad():
        k[:, hidden], v[:, hidden] = float("nan"), float("nan")
        with triton_machine.running():
            out = triton_attention.chunk_attention(q, k, v, mask.table(8 * n), 0.125)[:, -2 * n :]
    seen = [x.detach().double() for x in (q[:, -2 * n :], k[:, ~hidden], v[:, ~hidden])]
    true = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in seen), scale=0.125)
    torch.testing.assert_close(out.double(), true.transpose(1, 2), rtol=0, atol=0.01)

    mask = ChunkMask(20, 2, window_frames=2)  # a chunk sees itself alone
    q, k, v = leaves(1, 8 * n, 1, 64)
    upstream = torch.randn(1, 8 * n, 1, 64).to(BF16)
    with torch.no_grad():
        q[:, 4 * n :], upstream[:, 4 * n :] = float("nan"), float("nan")
    with triton_machine.running():
        out = triton_attention.chunk_attention(q, k, v, mask.table(8 * n), 0.125)
        grads = torch.autograd.grad(out, (q, k, v), upstream)
    assert all(x[:, : 4 * n].isfinite().all() for x in grads)


def test_a_long_past_costs_the_fresh_keys_nothing(triton_machine: TritonMachine) -> None:
    torch.manual_seed(0)
    inputs = leaves(1, 20, 1, 64)
    upstream = [torch.randn(1, 20, 1, 64).to(BF16), torch.zeros(1, 1, 20)]
    counts = []
    for past in (64, 512):
        old = tuple(torch.randn(1, past, 1, 64).to(BF16) for _ in "kv")
        cached(triton_machine, inputs, old, upstream, 0.125)
        counts.append({launch.name: launch.instructions for launch in triton_machine.launches})
    assert counts[0]["grad_keys"] == counts[1]["grad_keys"]
    assert counts[0]["grad_queries"] < counts[1]["grad_queries"]


def test_growing_scores(triton_machine: TritonMachine) -> None:
    """Each tile of keys has larger scores than all before: what was summed has to be scaled down."""
    torch.manual_seed(0)
    q = torch.rand(1, 20, 1, 64).bfloat16()
    k = (torch.rand(1, 200, 1, 64) * torch.linspace(0.1, 4, 200)[:, None, None]).bfloat16()
    inputs = [x.requires_grad_() for x in (q, k, torch.randn(1, 200, 1, 64).bfloat16())]
    upstream = [torch.randn(1, 20, 1, 64).bfloat16(), torch.randn(1, 1, 20)]
    check(cached(triton_machine, inputs, None, upstream, 0.5), inputs, None, upstream, 0.5)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(triton_machine: TritonMachine, scale: float) -> None:
    torch.manual_seed(0)
    inputs = leaves(1, 70, 1, 64)
    upstream = [torch.randn(1, 70, 1, 64).bfloat16(), torch.randn(1, 1, 70)]
    check(cached(triton_machine, inputs, None, upstream, scale), inputs, None, upstream, scale)


@pytest.mark.parametrize("head_dim", [20, 96])
def test_widths_without_a_kernel_are_padded(triton_machine: TritonMachine, head_dim: int) -> None:
    torch.manual_seed(0)
    whole = fused(1, 33, 2, 100, BF16)  # rows that aren't aligned
    inputs = [x[..., 1 : 1 + head_dim].requires_grad_() for x in whole]
    upstream = [torch.randn(1, 33, 2, head_dim).bfloat16(), torch.randn(1, 2, 33)]
    ours = cached(triton_machine, inputs, None, upstream, 0.2)
    assert all(x.is_contiguous() for x in ours)
    check(ours, inputs, None, upstream, 0.2)


def test_fresh_keys_inside_the_past(triton_machine: TritonMachine) -> None:
    """Keys and values as a cache holds them: a prefix of a longer buffer that is NaN past it."""
    torch.manual_seed(0)
    q = torch.randn(2, 24, 2, 64).bfloat16()
    for visible in (24, 144):
        buffer = torch.full((2, 2, 168, 2, 64), float("nan")).bfloat16()
        buffer[:, :, :visible] = torch.randn(2, 2, visible, 2, 64).bfloat16()
        k, v = buffer[0, :, :visible], buffer[1, :, :visible]
        with triton_machine.running():
            ours = triton_attention.cached_chunk_attention(q, None, None, k, v, 0.125)
        nothing = [torch.zeros_like(q), torch.zeros(2, 2, 24)]
        true, theirs = (by_hand([q, k, v], None, nothing, 0.125, None, rounded=r) for r in (False, True))
        for a, b, c in zip(ours, true[:2], theirs[:2], strict=True):
            exact.assert_close(a, b, c)


def test_nothing_to_attend_to(triton_machine: TritonMachine) -> None:
    q = torch.randn(1, 3, 2, 64).bfloat16().requires_grad_()
    with triton_machine.running():
        out, lse = triton_attention.cached_chunk_attention(q, q[:, :0], q[:, :0], None, None, 1.0)
        (grad,) = torch.autograd.grad(out, q, torch.ones_like(out))
        assert torch.equal(out, torch.zeros_like(q))
        assert torch.equal(grad, torch.zeros_like(q))
        assert torch.equal(lse, torch.full((1, 2, 3), float("-inf")))
        for empty in (q[:0], q[:, :0]):
            out = triton_attention.chunk_attention(
                empty, empty, empty, ChunkMask(3, 1).table(empty.shape[1]), 1.0
            )
            assert out.shape == empty.shape


def test_the_public_functions(triton_machine: TritonMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose tensors the choice of a backend would let through."""
    monkeypatch.setattr(api, "resolve", lambda backend, *call, **rest: backend)
    torch.manual_seed(0)
    inputs, mask = leaves(1, 24, 2, 64), ChunkMask(4, 2, window_frames=3)
    past = Past(*fused(1, 40, 2, 64, BF16)[1:], holds_fresh=False)
    with triton_machine.running():
        out, lse = api.cached_chunk_attention(*inputs, past, return_lse=True, backend="triton")
        chunked = api.chunk_attention(*inputs, mask, backend="triton")
        grads = torch.autograd.grad(out.sum() + lse.sum() + chunked.float().square().sum(), inputs)
    names = ["forward", "forward", "grad_queries", "grad_keys", "grad_queries", "grad_keys"]
    assert [launch.name for launch in triton_machine.launches] == names
    exactly = [x.detach().double().requires_grad_() for x in inputs]
    old = Past(past.k.double(), past.v.double(), holds_fresh=False)
    true_out, true_lse = api.cached_chunk_attention(*exactly, old, return_lse=True, backend="reference")
    true_chunked = api.chunk_attention(*exactly, mask, backend="reference")
    true = torch.autograd.grad(true_out.sum() + true_lse.sum() + true_chunked.square().sum(), exactly)
    results = zip((out, lse, chunked, *grads), (true_out, true_lse, true_chunked, *true), strict=True)
    for ours, theirs in results:
        torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


def test_torch_takes_the_op_as_its_own(triton_machine: TritonMachine) -> None:
    """Schema, fake tensors and autograd are registered as they must be; a compiled graph holds it whole."""
    torch.manual_seed(0)
    inputs, mask = leaves(1, 24, 1, 64), ChunkMask(4, 2)
    past = fused(1, 7, 1, 64, BF16)[1:]

    def attend(*qkv: Tensor) -> Tensor:
        return 2 * triton_attention.chunk_attention(*qkv, mask.table(24), 0.125)

    with triton_machine.running():
        torch.library.opcheck(torch.ops.stream_r1.triton_attention, (*inputs, *past, (), 0.125))
        compiled = torch.compile(attend, fullgraph=True)
        outs = [f(*inputs) for f in (attend, compiled)]
        grads = [torch.autograd.grad(out, inputs, torch.ones_like(out)) for out in outs]
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
