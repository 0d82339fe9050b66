"""Rows in FP8: against torch's own casts, float64, and the formula that they stand for."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stream_r1_kernels import QuantizedRows, modulated_norm_fp8, multiply_rows, quantize_rows
from stream_r1_kernels.fp8.rows import FP8, LEAST

ALL = torch.arange(256, dtype=torch.uint8).view(FP8)
HALF_STEP = 2.0**-4  # of a number's magnitude, to the nearest of e4m3's; below 2^-6 steps are 2^-9


def expected(x: Tensor) -> tuple[Tensor, Tensor]:
    """A row's scale, and its numbers divided by it, in float64."""
    scale = x.double().abs().amax(-1, keepdim=True) / 448
    return scale, x.double() / scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_rounded_to_the_nearest_by_their_largest_magnitude(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 5, 96) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    rows = quantize_rows(x)
    assert (rows.data.dtype, rows.scale.dtype, rows.scale.shape) == (FP8, torch.float32, (2, 5, 1))
    scale, wanted = expected(x)
    torch.testing.assert_close(rows.scale.double(), scale, rtol=1e-6, atol=0)
    known = ALL.double()
    known = known[known.isfinite()]
    nearest = (known - wanted[..., None]).abs().amin(-1)  # to any number of float8_e4m3fn
    assert ((rows.data.double() - wanted).abs() <= nearest + 1e-4).all()
    assert (rows.data.double().abs().amax(-1) == 448).all()
    error = (rows.dequantize(torch.float64) - x.double()).abs()
    assert (error <= HALF_STEP * x.double().abs() + 2.0**-10 * scale + 1e-6 * x.double().abs()).all()


def test_every_number_of_fp8_survives() -> None:
    numbers = ALL[ALL.float().isfinite()]
    rows = quantize_rows(numbers.float().reshape(1, 1, -1))
    assert torch.equal(rows.data.view(torch.uint8).flatten(), numbers.view(torch.uint8))
    assert rows.scale.item() == 1
    assert torch.equal(rows.dequantize(torch.float32).flatten(), numbers.float())


def test_rows_of_nothing_and_rows_that_are_not_finite() -> None:
    x = torch.randn(1, 5, 16)
    x[0, 1] = 0
    x[0, 2] = LEAST / 4
    x[0, 3, 4] = float("nan")
    x[0, 4, 4] = float("inf")
    rows = quantize_rows(x)
    read = rows.dequantize(torch.float32)
    assert torch.equal(read[0, 1], torch.zeros(16))
    assert read[0, :3].isfinite().all()
    assert read[0, 3].isnan().all()
    assert not read[0, 4].isfinite().any()
    torch.testing.assert_close(read[0, 0], x[0, 0], rtol=HALF_STEP, atol=0.01)


def test_gelu_is_not_rounded_before_it_is_quantised() -> None:
    torch.manual_seed(0)
    x = 2 * torch.randn(2, 3, 64).bfloat16()
    exact = functional.gelu(x.float(), approximate="tanh")
    rows, wanted = quantize_rows(x, gelu=True), quantize_rows(exact)
    assert torch.equal(rows.data.view(torch.uint8), wanted.data.view(torch.uint8))
    assert torch.equal(rows.scale, wanted.scale)


def test_the_norm_gives_the_rows_of_the_norm() -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 6, 40) + 1
    shift, scale = torch.randn(2, 2, 3, 40).unbind(0)
    normed = functional.layer_norm(x.double(), [40], eps=1e-6).unflatten(1, (3, 2))
    exact = (normed * (1 + scale.double()[:, :, None]) + shift.double()[:, :, None]).flatten(1, 2)
    rows = modulated_norm_fp8(x, shift, scale)
    wanted_scale, wanted = expected(exact)
    torch.testing.assert_close(rows.scale.double(), wanted_scale, rtol=1e-5, atol=0)
    assert ((rows.data.double() - wanted).abs() <= HALF_STEP * wanted.abs() + 2.0**-10 + 1e-3).all()


def test_the_product_is_that_of_the_dequantised_factors() -> None:
    torch.manual_seed(0)
    x, w, bias = torch.randn(2, 5, 64), torch.randn(1, 48, 64), torch.randn(48)
    rows, weights = quantize_rows(x), quantize_rows(w)
    weight = QuantizedRows(weights.data[0], weights.scale[0])
    exact = rows.dequantize(torch.float64) @ weight.dequantize(torch.float64).t() + bias.double()
    if torch.__version__.startswith("2.10."):
        with pytest.raises(
            RuntimeError, match=r"^multiply_rows: torch 2\.10\.\S+ has no row-wise FP8 product on CPUs$"
        ):
            multiply_rows(rows, weight, bias)
        return
    torch.testing.assert_close(multiply_rows(rows, weight, bias).double(), exact, rtol=1e-5, atol=1e-5)
    half = multiply_rows(rows, weight, bias.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=2**-7, atol=0.02)
    # Rounding both factors: each term is off by at most 2^-4 of itself twice, and by less than a step.
    true = x.double() @ w[0].double().t() + bias.double()
    terms = x.double().abs() @ w[0].double().abs().t()
    assert ((exact - true).abs() <= 0.14 * terms).all()
    assert (exact - true).square().mean().sqrt() < 0.05 * true.square().mean().sqrt()


def test_what_is_refused() -> None:
    x, shift = torch.randn(1, 2, 8), torch.randn(1, 1, 8)
    with pytest.raises(ValueError, match=r"^quantize_rows: x: expected shape \[B, T, K > 0\], got \[2, 8\]$"):
        quantize_rows(x[0])
    with pytest.raises(TypeError, match=r"^quantize_rows: x: expected float32.*, got torch.int64$"):
        quantize_rows(x.long())
    with pytest.raises(ValueError, match=r"^modulated_norm_fp8: has no backward: expected .*no_grad"):
        modulated_norm_fp8(x.requires_grad_(), shift, shift)
    with pytest.raises(RuntimeError, match="'cpu' has no kernel of quantize_rows"):
        quantize_rows(x.detach(), backend="cpu")
