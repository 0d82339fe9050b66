"""quantize_rows and modulated_norm_fp8, run on real tensors: by their own rounding (sm_80) and by the
instruction for it (sm_89)."""

from collections.abc import Iterator

import pytest
import toolchain
import torch
from machine import Machine
from torch import Tensor
from torch.nn import functional

from stream_r1_kernels.fp8.reference import modulated_norm_fp8_reference, quantize_rows_reference
from stream_r1_kernels.fp8.rows import LEAST

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (2, 15, 33), (1, 9, 264), (1, 3, 600)]
UNIT = '#include "cuda/modulated_norm.cuh"\n#include "cuda/quantize_rows.cuh"\n' + "".join(
    f'extern "C" __global__ void {name}_{suffix}(const __grid_constant__ stream_r1::cuda::{args} args)'
    f" {{ stream_r1::cuda::{name}<{element}>(args); }}\n"
    for name, args in (("quantize_rows", "QuantizeRowsArgs"), ("modulated_norm_fp8", "ModulatedNormArgs"))
    for element, suffix in (("float", "fp32"), ("stream_r1::Bf16", "bf16"), ("stream_r1::Fp16", "fp16"))
)


@pytest.fixture(name="either", params=["80", "89"])
def _either(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """The machine, with the kernels as they are for a GPU of this compute capability."""
    if request.param == "80":
        yield machine
        return
    ptx = toolchain.compile_ptx(UNIT, {}, request.param)
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    with machine.replaced(ptx):
        yield machine


def assert_same_bits(data: Tensor, true: Tensor) -> None:
    assert data.dtype == true.dtype == torch.float8_e4m3fn
    nan = true.float().isnan()
    assert torch.equal(data.float().isnan(), nan)
    assert torch.equal(data.view(torch.uint8)[~nan], true.view(torch.uint8)[~nan])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "width"), SHAPES)
def test_quantize_rows(either: Machine, batch: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(batch, tokens, 2 * width) * torch.logspace(-3, 3, tokens)[:, None]).to(dtype)[
        ..., :width
    ]
    data, scale = either.run("quantize_rows", x, False)
    true = quantize_rows_reference(x)
    assert torch.equal(scale, true.scale)
    assert_same_bits(data, true.data)


def test_every_number_of_fp8_and_what_lies_between(either: Machine) -> None:
    """In a row whose largest is 448, so that nothing is scaled."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = numbers[numbers.isfinite()].sort().values
    points = torch.cat([finite, (finite[1:] + finite[:-1]) / 2])
    around = [torch.nextafter(points, torch.full_like(points, end)) for end in (-torch.inf, torch.inf)]
    x = torch.cat([points, *around]).clamp(-448, 448)[None, None]
    data, scale = either.run("quantize_rows", x, False)
    assert scale.item() == 1
    assert_same_bits(data, x.to(torch.float8_e4m3fn))


def test_rows_of_nothing_and_rows_that_are_not_finite(either: Machine) -> None:
    x = torch.randn(1, 6, 40)
    x[0, 1], x[0, 2] = 0, LEAST / 4
    x[0, 3, 7], x[0, 4, 35], x[0, 5, 0] = torch.nan, torch.inf, -torch.nan
    data, scale = either.run("quantize_rows", x, False)
    true = quantize_rows_reference(x)
    torch.testing.assert_close(scale, true.scale, rtol=0, atol=0, equal_nan=True)
    assert_same_bits(data, true.data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(either: Machine, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 7, 130)).to(dtype)
    x[0, 0, :4] = torch.tensor([-1e4, -9.0, 9.0, 0.0])
    data, scale = either.run("quantize_rows", x, True)
    exact = functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(scale.double(), exact.abs().amax(-1, keepdim=True) / 448, rtol=1e-6, atol=0)
    error = (data.double() * scale - exact).abs()
    assert (error <= exact.abs() / 16 * 1.001 + scale * 2.0**-10 * 1.01).all()


@pytest.mark.parametrize("float_modulation", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "frames", "tokens", "width"), [(2, 2, 5, 33), (2, 3, 4, 64), (1, 1, 9, 264)]
)
def test_modulated_norm(
    either: Machine,
    batch: int,
    frames: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    float_modulation: bool,
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(batch, frames * tokens, 2 * width) * 3 + 1).to(dtype)[:, :, :width]
    six = torch.randn(batch, frames, 6, width).to(torch.float32 if float_modulation else dtype)
    data, scale = either.run("modulated_norm_fp8", x, six[:, :, 0], six[:, :, 4], 1e-6)
    normed = functional.layer_norm(x.double(), [width], eps=1e-6).unflatten(1, (frames, tokens))
    exact = (normed * (1 + six.double()[:, :, 4, None]) + six.double()[:, :, 0, None]).flatten(1, 2)
    torch.testing.assert_close(scale.double(), exact.abs().amax(-1, keepdim=True) / 448, rtol=1e-5, atol=0)
    error = (data.double() * scale - exact).abs()
    assert (error <= exact.abs() / 16 * 1.001 + scale * (2.0**-10 + 1e-3)).all()
    true = modulated_norm_fp8_reference(x, six[:, :, 0], six[:, :, 4], 1e-6)
    assert (data.view(torch.uint8) == true.data.view(torch.uint8)).double().mean() > 0.99


def test_no_tokens(machine: Machine) -> None:
    x, scale = torch.randn(2, 0, 8), torch.randn(2, 1, 8)
    for data, row_scale in (
        machine.run("quantize_rows", x, True),
        machine.run("modulated_norm_fp8", x, scale, scale, 1e-6),
    ):
        assert (data.shape, row_scale.shape) == ((2, 0, 8), (2, 0, 1))
