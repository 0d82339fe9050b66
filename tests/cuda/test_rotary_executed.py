"""qk_norm_rotary: forward and backward, run on real tensors, against float64."""

import exact
import pytest
import torch
from machine import Machine
from torch import Tensor

from stream_r1_kernels import RotaryGrid
from stream_r1_kernels.rotary.reference import norm_rotary

SHAPES = [
    (1, (1, 1, 1), 1, 64),  # one token
    (2, (2, 3, 5), 3, 64),
    (1, (2, 2, 3), 2, 128),
    (2, (1, 3, 3), 3, 10),  # packs that cross heads
    (1, (1, 2, 2), 5, 2),
    (1, (3, 5, 5), 1, 24),  # more rows than a block of the backward sums
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(batch: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q and k as slices of one projection, and their weights."""
    q, k, _ = torch.randn(batch, tokens, 3 * width).to(dtype).split(width, dim=-1)
    return q, k, 1 + 0.1 * torch.randn(width), (1 + 0.1 * torch.randn(width)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "grid", "heads", "head_dim"), SHAPES)
def test_forward(
    machine: Machine, batch: int, grid: tuple[int, int, int], heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    cos, sin = RotaryGrid(head_dim).phases(5, *grid)
    q, k, q_weight, k_weight = inputs(batch, len(cos), heads * head_dim, dtype)
    ours = machine.run("qk_norm_rotary", q, k, q_weight, k_weight, cos, sin, heads, 1e-6)
    for out, x, weight in zip(ours, (q, k), (q_weight, k_weight), strict=True):
        true = norm_rotary(x.double(), weight.double(), cos.double(), sin.double(), heads, 1e-6)
        exact.assert_close(out, true, norm_rotary(x, weight, cos, sin, heads, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_into_their_slot(machine: Machine, dtype: torch.dtype) -> None:
    """The slot is a view in a longer buffer, of which nothing else is written."""
    torch.manual_seed(0)
    cos, sin = RotaryGrid(64).phases(2, 1, 3, 4)
    q, k, q_weight, k_weight = inputs(2, 12, 128, dtype)
    buffer = torch.full((2, 40, 2, 64), 7.0, dtype=dtype)
    slot = buffer[:, 12:24]
    q_out = machine.run("qk_norm_rotary_into", q, k, q_weight, k_weight, cos, sin, 2, 1e-6, slot)
    separate = machine.run("qk_norm_rotary", q, k, q_weight, k_weight, cos, sin, 2, 1e-6)
    assert torch.equal(q_out, separate[0])
    assert torch.equal(slot, separate[1])
    assert (buffer[:, :12] == 7).all()
    assert (buffer[:, 24:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "grid", "heads", "head_dim"), SHAPES)
def test_backward(
    machine: Machine, batch: int, grid: tuple[int, int, int], heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    cos, sin = RotaryGrid(head_dim).phases(5, *grid)
    q, k, q_weight, k_weight = inputs(batch, len(cos), heads * head_dim, dtype)
    upstream = [torch.randn(batch, heads, len(cos), head_dim).to(dtype).transpose(1, 2) for _ in "qk"]
    ours = machine.run("qk_norm_rotary_backward", *upstream, q, k, q_weight, k_weight, cos, sin, heads, 1e-6)

    def gradients(kind: torch.dtype | None) -> list[Tensor]:
        leaves = [(x.to(kind) if kind else x).detach().requires_grad_() for x in (q, k, q_weight, k_weight)]
        phases = [p.to(kind) if kind else p for p in (cos, sin)]
        outs = [norm_rotary(leaves[i], leaves[2 + i], *phases, heads, 1e-6) for i in range(2)]
        return list(
            torch.autograd.grad(
                outs, leaves, [g.to(out.dtype) for g, out in zip(upstream, outs, strict=True)]
            )
        )

    for a, b, c in zip(ours, gradients(torch.float64), gradients(None), strict=True):
        exact.assert_close(a, b, c)


def test_no_rows(machine: Machine) -> None:
    cos, sin = RotaryGrid(8).phases(0, 1, 1, 2)
    q, weight = torch.randn(0, 2, 16), torch.ones(16)
    assert machine.run("qk_norm_rotary", q, q, weight, weight, cos, sin, 2, 1e-6)[0].shape == (0, 2, 2, 8)
    grads = machine.run(
        "qk_norm_rotary_backward", *[q.view(0, 2, 2, 8)] * 2, q, q, weight, weight, cos, sin, 2, 1e-6
    )
    assert torch.equal(grads[2], torch.zeros(16))


def test_the_order_of_warps_does_not_matter(machine: Machine) -> None:
    torch.manual_seed(0)
    cos, sin = RotaryGrid(16).phases(0, 2, 5, 9)
    q, k, q_weight, k_weight = inputs(1, 90, 32, torch.bfloat16)
    upstream = torch.randn(1, 90, 2, 16).bfloat16()
    call = ("qk_norm_rotary_backward", upstream, upstream, q, k, q_weight, k_weight, cos, sin, 2, 1e-6)
    results = [machine.run(*call, seed=seed) for seed in range(3)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
