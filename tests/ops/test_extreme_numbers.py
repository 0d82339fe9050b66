"""Every op where numbers are not finite, large, tiny or few: as its reference, or float64."""

import math

import pytest
import torch
from every_op import OPS, PAIRS
from extremes import check_gradients_at_large_logits, kinds, run
from torch import Tensor
from torch.nn import functional

from stream_r1_kernels import cached_chunk_attention, dmd_loss, fused_linear, region_saliency, rms_norm_silu


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_what_is_not_finite_comes_out_as_from_the_reference(name: str, backend: str, bad: float) -> None:
    width = 3
    for place in range(len(OPS[name].draw(width, torch.float32))):
        for at in (0, -1):
            inputs = OPS[name].draw(width, torch.float32)
            inputs[place].view(-1)[at] = bad
            expected, ours = run(name, "reference", inputs), run(name, backend, inputs)
            if math.isnan(bad):
                lets_through = name not in ("dmd_loss", "dmd_gradient_") or place > 2
                assert any(x.isnan().any() for x in expected) == lets_through
            for part, (a, b) in enumerate(zip(ours, expected, strict=True)):
                if part == 0 or math.isnan(bad):
                    assert torch.equal(kinds(a), kinds(b)), (place, at, part, a, b)
                elif backend == "cpu":  # of what has no gradient, inf - inf, the order of a sum decides
                    assert not (a.isfinite() & ~b.isfinite()).any(), (place, at, part, a, b)
                finite = a.isfinite() & b.isfinite()
                torch.testing.assert_close(a[finite], b[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-5, 1.0, 3e2, 3e4])
@pytest.mark.parametrize(("name", "backend"), [*PAIRS, *((name, "reference") for name in OPS)])
def test_float16_is_finite_wherever_the_true_value_is(name: str, backend: str, size: float) -> None:
    """Forward and backward, by gradients as a scaled loss has them; each input large or tiny in turn."""
    for place in [None, *range(len(OPS[name].draw(2, torch.float16)))]:
        for upstream in (1e-4, 1e4) if OPS[name].trained else (1.0,):
            inputs = OPS[name].draw(2, torch.float16)
            for i in range(len(inputs)):
                if place in (None, i):
                    inputs[i] = (inputs[i].double() * size).clamp(-6e4, 6e4).to(inputs[i].dtype)
            exact = run(name, "reference", [x.double() for x in inputs], upstream)
            for part, (a, b) in enumerate(zip(run(name, backend, inputs, upstream), exact, strict=True)):
                reachable = b.abs() < 0.99 * torch.finfo(a.dtype).max
                assert a[reachable].isfinite().all(), (place, upstream, part, a, b)
                if part == 0:  # what is finite is right, not cut off
                    scale = b[reachable].abs().max().item() if reachable.any() else 0.0
                    error = (a.double() - b)[reachable].abs()
                    assert (error <= 0.02 * scale + 1e-6).all(), (place, upstream, a, b)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_widths_of_one_and_two(name: str, backend: str, dtype: torch.dtype, width: int) -> None:
    inputs = OPS[name].draw(width, dtype)
    exact = run(name, "reference", [x.double() for x in inputs])
    same = run(name, "reference", inputs)
    for a, b, c in zip(run(name, backend, inputs), exact, same, strict=True):
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(
            a.double(), b, rtol=2 * unit, atol=2 * (c - b).abs().max().item() + 16 * unit
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e2, 1e3, 1e4])
def test_gradients_at_large_logits_are_as_exact_as_torchs(size: float, dtype: torch.dtype) -> None:
    for backend in ("cpu", "reference"):
        check_gradients_at_large_logits(backend, size, dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_tile_of_infinitely_low_scores_counts_as_nothing(backend: str) -> None:
    q, v = torch.ones(1, 3, 1, 2), torch.randn(1, 500, 1, 2)
    k = torch.cat([torch.full((1, 400, 1, 2), -math.inf), torch.zeros(1, 100, 1, 2)], 1)
    out, lse = cached_chunk_attention(q, k, v, None, return_lse=True, backend=backend)
    torch.testing.assert_close(out, v[:, 400:].mean(1, keepdim=True).expand_as(out))
    torch.testing.assert_close(lse, torch.full((1, 1, 3), math.log(100)))
    out, lse = cached_chunk_attention(q, k[:, :400], v[:, :400], None, return_lse=True, backend=backend)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float16_gradients_of_a_loss_whose_direction_leaves_its_range(backend: str) -> None:
    torch.manual_seed(0)
    real = torch.randn(2, 2, 16, 32, 32).half()
    x, fake = real.clone(), real + torch.randn_like(real) / 2
    x[:, 0, 0, 0, 0] += 0.01  # the normaliser is 1e-7 of the distance to the critic
    weights = {"w_intra": torch.rand(2, 2, 1, 32, 32) * 1e3, "w_inter": torch.tensor([1e-3, 1e3])}

    def gradient(dtype: torch.dtype, backend: str, scale: float) -> Tensor:
        leaf = x.to(dtype).requires_grad_()
        loss = dmd_loss(leaf, fake.to(dtype), real.to(dtype), **weights, backend=backend)
        return torch.autograd.grad(scale * loss, leaf)[0].double()

    for scale in (1e-3, 1e-8):
        exact = gradient(torch.float64, "reference", scale)
        got = gradient(torch.float16, backend, scale)
        reachable = exact.abs() < 6e4
        torch.testing.assert_close(got[reachable], exact[reachable], rtol=2e-3, atol=1e-7)


def test_activations_vanish_at_large_negative_numbers() -> None:
    """As torch's do: -0 where the sigmoid underflows, NaN of -inf."""
    x = torch.tensor([-60.0, -100.0, -1e10, -3e38])
    ours = fused_linear(x[None, :, None], [torch.ones(1, 1)], gelu=True, backend="auto").flatten()
    torch.testing.assert_close(ours, functional.gelu(x, approximate="tanh"))
    with torch.no_grad():
        ours = fused_linear(x[None, :, None], [torch.ones(1, 1)], gelu=True, backend="cpu").flatten()
    torch.testing.assert_close(ours, functional.gelu(x, approximate="tanh"))
    row, weight = torch.ones(1, 1, 4), torch.cat([x[:3], torch.tensor([-math.inf])])
    torch.testing.assert_close(
        rms_norm_silu(row, weight, eps=0.0, backend="cpu")[0, 0], functional.silu(weight), equal_nan=True
    )


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e25, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_norms_whose_squares_leave_the_range(backend: str, dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    grads = (torch.randn(1, 5, 3, 2, 50) * size).to(dtype)
    grads[..., 3] = 0
    saliency = region_saliency(grads, (2, 1, 50), backend=backend)
    exact = region_saliency(grads.double(), (2, 1, 50), backend="reference")
    torch.testing.assert_close((saliency / size).double(), exact / size, rtol=1e-5, atol=1e-5)
