"""Rotary positions and the fused norm + rotary against complex arithmetic in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_r1_kernels import RotaryGrid, apply_rotary, qk_norm_rotary

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def exact_norm_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    """In float64, the rotation as a product of complex numbers."""
    normed = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    pairs = torch.view_as_complex(normed.unflatten(-1, (heads, -1, 2)).contiguous())
    phase = torch.complex(cos.double(), sin.double())[:, None]
    return torch.view_as_real(pairs * phase).flatten(-2)


def fused_slices(batch: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q and k as they come out of one fused q, k, v projection."""
    q, k, _ = torch.randn(batch, tokens, 3 * width).to(dtype).split(width, dim=-1)
    return q, k


def assert_close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps
    scale = max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
    torch.testing.assert_close(ours.double(), exact, rtol=2 * unit, atol=4 * unit * scale)


@quick
@given(
    batch=st.integers(0, 3),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    heads=st.integers(1, 4),
    head=st.sampled_from([2, 6, 10, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    float_weights=st.booleans(),
    backend=st.sampled_from(["cpu", "reference"]),
)
def test_forward_and_backward(
    batch: int,
    grid: tuple[int, int, int],
    heads: int,
    head: int,
    dtype: torch.dtype,
    float_weights: bool,
    backend: str,
) -> None:
    torch.manual_seed(0)
    frames, rows, columns = grid
    tokens, width = frames * rows * columns, heads * head
    cos, sin = RotaryGrid(head).phases(5, frames, rows, columns)
    q, k = (x.requires_grad_() for x in fused_slices(batch, tokens, width, dtype))
    weights = [
        (1 + 0.1 * torch.randn(width)).to(torch.float32 if float_weights else dtype).requires_grad_()
        for _ in "qk"
    ]
    out = qk_norm_rotary(q, k, *weights, cos, sin, num_heads=heads, eps=1e-5, backend=backend)
    upstream = [torch.randn(batch, heads, tokens, head).to(dtype).transpose(1, 2) for _ in "qk"]
    grads = torch.autograd.grad(out, (q, k, *weights), upstream)

    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, *weights)]
    exact = [exact_norm_rotary(exact_inputs[i], exact_inputs[2 + i], cos, sin, heads, 1e-5) for i in range(2)]
    exact_grads = torch.autograd.grad(exact, exact_inputs, [g.double() for g in upstream])
    for ours, theirs in zip((*out, *grads), (*exact, *exact_grads), strict=True):
        assert ours.shape == theirs.shape
        assert_close(ours, theirs, dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_keys_go_straight_into_their_slot(backend: str) -> None:
    heads, head = 2, 16
    cos, sin = RotaryGrid(head).phases(0, 2, 2, 3)
    q, k = fused_slices(2, 12, heads * head, torch.bfloat16)
    weight = torch.ones(heads * head)
    buffer = torch.full((2, 40, heads, head), 7.0, dtype=torch.bfloat16)
    slot = buffer[:, 12:24]
    fused_q, fused_k = qk_norm_rotary(
        q, k, weight, weight, cos, sin, num_heads=heads, k_out=slot, backend=backend
    )
    plain_q, plain_k = qk_norm_rotary(q, k, weight, weight, cos, sin, num_heads=heads, backend=backend)
    assert fused_k is slot
    assert torch.equal(fused_q, plain_q)
    assert torch.equal(buffer[:, 12:24], plain_k)
    assert (buffer[:, :12] == 7).all()
    assert (buffer[:, 24:] == 7).all()


def test_phases_match_diffusers() -> None:
    transformer_wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    embed = transformer_wan.WanRotaryPosEmbed(64, (1, 2, 2), 1024)
    cos, sin = embed(torch.zeros(1, 16, 6, 8, 14))  # [1, T, 1, D], each phase twice
    ours_cos, ours_sin = RotaryGrid(64).phases(0, 6, 4, 7)
    torch.testing.assert_close(ours_cos, cos[0, :, 0, ::2].float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours_sin, sin[0, :, 0, ::2].float(), rtol=0, atol=1e-6)


def test_phases_have_no_last_frame() -> None:
    grid = RotaryGrid(128)
    assert grid.axes == (44, 42, 42)
    cos, sin = grid.phases(10_000_000, 1, 1, 1)
    angle = 10_000_000 * 10_000.0 ** (-2 / 44)
    assert cos[0, 1].item() == pytest.approx(torch.tensor(angle, dtype=torch.float64).cos().item(), abs=1e-7)
    assert (cos.square() + sin.square() - 1).abs().max() < 1e-6


@quick
@given(start=st.integers(0, 200), delta=st.integers(-100, 100))
def test_temporal_shift_moves_keys_in_time(start: int, delta: int) -> None:
    grid = RotaryGrid(20)
    keys = torch.randn(1, 6, 2, 20, dtype=torch.float64)
    moved = apply_rotary(apply_rotary(keys, *grid.phases(start, 1, 2, 3)), *grid.temporal_shift(delta))
    there = apply_rotary(keys, *grid.phases(start + delta, 1, 2, 3))
    torch.testing.assert_close(moved, there, rtol=0, atol=1e-6)


def test_arguments_are_checked() -> None:
    cos, sin = RotaryGrid(8).phases(0, 1, 2, 3)
    q, weight = torch.randn(1, 6, 16), torch.ones(16)
    with pytest.raises(
        ValueError, match="num_heads: expected a number of heads of even width in 16 channels, got 3"
    ):
        qk_norm_rotary(q, q, weight, weight, cos, sin, num_heads=3)
    with pytest.raises(ValueError, match=r"cos: expected shape \(6, 4\), got \(5, 4\)"):
        qk_norm_rotary(q, q, weight, weight, cos[:5], sin, num_heads=2)
    with pytest.raises(TypeError, match=r"k: expected torch.float32 as q, got torch.float16"):
        qk_norm_rotary(q, q.half(), weight, weight, cos, sin, num_heads=2)
    with pytest.raises(ValueError, match="k_out: expected None where q, k or a weight requires grad"):
        qk_norm_rotary(
            q.clone().requires_grad_(), q, weight, weight, cos, sin, num_heads=2, k_out=q.view(1, 6, 2, 8)
        )
    with pytest.raises(ValueError, match="head_dim: expected an even number"):
        RotaryGrid(7)


def test_opcheck() -> None:
    cos, sin = RotaryGrid(8).phases(0, 1, 2, 3)
    q, k = (x.requires_grad_() for x in fused_slices(2, 6, 16, torch.float32))
    weights = [torch.randn(16, requires_grad=True) for _ in "qk"]
    torch.library.opcheck(torch.ops.stream_r1.qk_norm_rotary.default, (q, k, *weights, cos, sin, 2, 1e-6))
    frozen = [x.detach() for x in (q, k, *weights)]
    slot = torch.zeros(2, 30, 2, 8)[:, 6:12]
    torch.library.opcheck(torch.ops.stream_r1.qk_norm_rotary_into.default, (*frozen, cos, sin, 2, 1e-6, slot))


def test_compiles_in_one_graph_and_once_along_a_stream() -> None:
    grid = RotaryGrid(8)
    weight = torch.ones(16)
    torch.compiler.reset()

    @torch.compile(fullgraph=True)
    def step(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, whole: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """Into a slot that is an input, and into one that is cut out of an input."""
        given = qk_norm_rotary(q, k, weight, weight, cos, sin, num_heads=2, k_out=slot)[0]
        inside = whole[1, :, start : start + 6]
        cut, keys = qk_norm_rotary(q + 1, k * 2, weight, weight, cos, sin, num_heads=2, k_out=inside)
        return given + 1, cut + keys

    buffer, whole, plain_whole = (
        torch.zeros(1, 60, 2, 8),
        torch.zeros(2, 1, 60, 2, 8),
        torch.zeros(2, 1, 60, 2, 8),
    )
    with torch.no_grad():
        for chunk in range(5):
            cos, sin = grid.phases(chunk, 1, 2, 3)
            q, k = fused_slices(1, 6, 16, torch.float32)
            slot = buffer[:, 6 * chunk : 6 * chunk + 6]
            with torch._dynamo.config.patch(error_on_recompile=chunk > 1):
                out, both = step(q, k, cos, sin, slot, whole, 6 * chunk)
            plain_q, plain_k = qk_norm_rotary(q, k, weight, weight, cos, sin, num_heads=2)
            assert torch.equal(out, plain_q + 1)
            assert torch.equal(slot, plain_k)
            cut, keys = qk_norm_rotary(q + 1, k * 2, weight, weight, cos, sin, num_heads=2)
            assert torch.equal(both, cut + keys)
            plain_whole[1, :, 6 * chunk : 6 * chunk + 6] = keys
            assert torch.equal(whole, plain_whole)
