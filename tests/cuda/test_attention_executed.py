"""Both attention ops: the PTX that nvcc makes of them, run on real tensors, against float64."""

import exact
import pytest
import torch
from attention_inputs import MASKS, OWN_MASKS, Sizes, fused, masked_attention, visible_tokens
from machine import Machine
from torch import Tensor

from stream_r1_kernels import ChunkMask, RangeMask


def check(
    ours: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None
) -> None:
    true_out, true_lse = masked_attention(q.double(), k.double(), v.double(), scale, visible)
    # the tensor cores round the weights to the op's dtype, as torch does in its own attention
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double() * scale, k.double())
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = torch.einsum("bhqk,bkhd->bqhd", weights.to(q.dtype).double(), v.double())
    rounded = (rounded / weights.sum(-1).transpose(1, 2)[..., None]).to(q.dtype)
    exact.assert_close(ours[0], true_out, rounded)
    exact.assert_close(ours[1], true_lse, true_lse.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(1, 1, 0, 1, 1, 64),  # one token
        Sizes(2, 150, 0, 200, 2, 64),  # ragged on both sides
        Sizes(1, 130, 64, 64, 1, 128),  # whole tiles
        Sizes(2, 48, 144, 48, 1, 128),  # a window while it fills: two segments, neither a whole tile
        Sizes(1, 40, 300, 0, 2, 64),  # fresh keys inside the past
    ],
)
def test_cached_chunk_attention(machine: Machine, dtype: torch.dtype, sizes: Sizes) -> None:
    q, k, v, past_k, past_v = sizes.draw(dtype)
    own = (k, v) if sizes.fresh else (None, None)
    old = (past_k, past_v) if sizes.past else (None, None)
    scale = sizes.head_dim**-0.5
    ours = machine.run("cached_chunk_attention", q, *own, *old, scale)
    check(ours, q, torch.cat((past_k, k), 1), torch.cat((past_v, v), 1), scale)


def test_a_window_in_one_buffer(machine: Machine) -> None:
    """Keys and values as a cache holds them: a prefix of a longer buffer that is NaN past it."""
    torch.manual_seed(0)
    q = torch.randn(2, 24, 2, 64).bfloat16()
    for visible in (24, 72, 144):
        buffer = torch.full((2, 2, 168, 2, 64), float("nan")).bfloat16()
        buffer[:, :, :visible] = torch.randn(2, 2, visible, 2, 64).bfloat16()
        k, v = buffer[0, :, :visible], buffer[1, :, :visible]
        check(machine.run("cached_chunk_attention", q, None, None, k, v, 0.125), q, k, v, 0.125)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_split_over_the_keys(machine: Machine, dtype: torch.dtype) -> None:
    """On a GPU with room for more blocks than there are queries."""
    torch.manual_seed(0)
    q = torch.randn(2, 30, 1, 64).to(dtype)
    past_k, past_v = (torch.randn(2, 530, 1, 64).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, 30, 1, 64).to(dtype) for _ in range(2))
    ours = machine.run("cached_chunk_attention", q, k, v, past_k, past_v, 0.125, processors=8)
    assert len(machine.launches) == 2
    check(ours, q, torch.cat((past_k, k), 1), torch.cat((past_v, v), 1), 0.125)


def test_growing_scores(machine: Machine) -> None:
    """Each tile of keys has larger scores than all before: what was summed has to be scaled down."""
    torch.manual_seed(0)
    q = torch.rand(1, 20, 1, 64).bfloat16()
    k = (torch.rand(1, 200, 1, 64) * torch.linspace(0.1, 4, 200)[:, None, None]).bfloat16()
    v = torch.randn(1, 200, 1, 64).bfloat16()
    check(machine.run("cached_chunk_attention", q, k, v, None, None, 0.5), q, k, v, 0.5)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(machine: Machine, scale: float) -> None:
    torch.manual_seed(0)
    q, k, v = fused(1, 70, 1, 64, torch.bfloat16)
    check(machine.run("cached_chunk_attention", q, k, v, None, None, scale), q, k, v, scale)


def test_widths_without_a_kernel_are_padded(machine: Machine) -> None:
    torch.manual_seed(0)
    for head_dim in (20, 64, 96):
        q, k, v = (
            x[:, :, :, :head_dim] for x in fused(1, 33, 2, 100, torch.bfloat16)
        )  # rows that aren't aligned
        ours = machine.run("cached_chunk_attention", q, k, v, None, None, head_dim**-0.5)
        assert ours[0].is_contiguous()
        check(ours, q, k, v, head_dim**-0.5)


def test_nothing_to_attend_to(machine: Machine) -> None:
    q = torch.randn(1, 3, 2, 64).bfloat16()
    out, lse = machine.run("cached_chunk_attention", q, q[:, :0], q[:, :0], None, None, 1.0)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((1, 2, 3), float("-inf")))
    for empty in (q[:0], q[:, :0]):
        out, _ = machine.run("cached_chunk_attention", empty, empty, empty, None, None, 1.0)
        assert out.shape == empty.shape


def test_the_order_of_warps_does_not_matter(machine: Machine) -> None:
    torch.manual_seed(0)
    q, k, v = fused(1, 140, 1, 64, torch.bfloat16)
    results = [
        machine.run("cached_chunk_attention", q, k, v, None, None, 0.125, seed=seed) for seed in range(3)
    ]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("mask", MASKS)
def test_chunk_attention(machine: Machine, mask: ChunkMask) -> None:
    torch.manual_seed(0)
    visible = visible_tokens(mask, frames=7)
    q, k, v = fused(1, len(visible), 1, 64, torch.bfloat16)
    ours = machine.run("chunk_attention", q, k, v, mask.table(len(visible)), 0.125)
    check(ours, q, k, v, 0.125, visible)


@pytest.mark.parametrize(("mask", "tokens"), OWN_MASKS)
def test_masks_of_ones_own(machine: Machine, mask: RangeMask, tokens: int) -> None:
    torch.manual_seed(0)
    visible = mask.visible(tokens)
    q, k, v = fused(1, tokens, 1, 64, torch.bfloat16)
    out, lse = machine.run("chunk_attention", q, k, v, mask.table(tokens), 0.125)
    seeing = visible.any(1)
    check((out[:, seeing], lse[:, :, seeing]), q[:, seeing], k, v, 0.125, visible[seeing])
    assert not out[:, ~seeing].any()
    assert (lse[:, :, ~seeing] == float("-inf")).all()

    upstream = torch.randn_like(q)
    grads = machine.run("chunk_attention_backward", upstream, q, k, v, out, lse, mask.table(tokens), 0.125)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    true = torch.autograd.grad(
        masked_attention(leaves[0][:, seeing], *leaves[1:], 0.125, visible[seeing])[0],
        leaves,
        upstream[:, seeing].double(),
    )
    for ours, theirs in zip(grads, true, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=0.005 * theirs.abs().max().item())


def test_backward_of_cached_chunk_attention(machine: Machine) -> None:
    torch.manual_seed(0)
    q, k, v = (x.float().requires_grad_() for x in fused(2, 37, 2, 16, torch.bfloat16))
    past_k, past_v = (torch.randn(2, 11, 2, 16) for _ in range(2))
    out, lse = masked_attention(q, torch.cat((past_k, k), 1), torch.cat((past_v, v), 1), 0.25)
    up_out, up_lse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), (q, k, v), (up_out, up_lse))
    inputs = [x.detach() for x in (q, k, v)]
    ours = machine.run(
        "cached_chunk_attention_backward",
        up_out,
        up_lse,
        *inputs,
        past_k,
        past_v,
        out.detach(),
        lse.detach(),
        0.25,
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_backward_of_chunk_attention(machine: Machine, mask: ChunkMask) -> None:
    torch.manual_seed(0)
    visible = visible_tokens(mask, frames=7)
    q, k, v = (x.float().requires_grad_() for x in fused(1, len(visible), 2, 16, torch.bfloat16))
    out, lse = masked_attention(q, k, v, 0.25, visible)
    upstream = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), upstream)
    inputs = [x.detach() for x in (q, k, v, out, lse)]
    ours = machine.run("chunk_attention_backward", upstream, *inputs, mask.table(len(visible)), 0.25)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
