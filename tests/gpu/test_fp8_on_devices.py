"""Rows in FP8, what multiplies them and a cache of them, on every device of this machine."""

import pytest
import torch
from torch.nn import functional

from stream_r1_kernels import (
    Fp8ChunkCache,
    QuantizedRows,
    RotaryGrid,
    modulated_norm_fp8,
    multiply_rows,
    quantize_rows,
)

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A GPU without FP8 tensor cores is refused a product in it: `refuse_quantization`.
MULTIPLYING = [
    device for device in DEVICES if device == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_rows(device: str, dtype: torch.dtype, gelu: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 30, 1544)[..., 3:1540].to(device, dtype)
    exact = functional.gelu(x.double(), approximate="tanh") if gelu else x.double()
    rows = quantize_rows(x, gelu=gelu)
    step = exact.abs().amax(-1, keepdim=True) / 448
    torch.testing.assert_close(rows.scale.double(), step, rtol=1e-5, atol=0)
    error = (rows.data.double() * rows.scale - exact).abs()
    assert (error <= exact.abs() / 16 * 1.001 + step * (2.0**-10 + 1e-4)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_norm(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 12, 1536) + 1).to(device, dtype)
    shift, scale = torch.randn(2, 2, 3, 1536, device=device).unbind(0)
    normed = functional.layer_norm(x.double(), [1536], eps=1e-6).unflatten(1, (3, 4))
    exact = (normed * (1 + scale.double()[:, :, None]) + shift.double()[:, :, None]).flatten(1, 2)
    rows = modulated_norm_fp8(x, shift, scale)
    step = exact.abs().amax(-1, keepdim=True) / 448
    torch.testing.assert_close(rows.scale.double(), step, rtol=1e-4, atol=0)
    error = (rows.data.double() * rows.scale - exact).abs()
    assert (error <= exact.abs() / 16 * 1.001 + step * (2.0**-10 + 1e-2)).all()


@pytest.mark.parametrize("device", MULTIPLYING)
def test_the_product(device: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 70, 1536, device=device).bfloat16(), torch.randn(1, 512, 1536, device=device)
    bias = torch.randn(512, device=device).bfloat16()
    rows, weights = quantize_rows(x), quantize_rows(w)
    weight = QuantizedRows(weights.data[0], weights.scale[0])
    exact = (rows.data.double() * rows.scale) @ (weight.data.double() * weight.scale).t() + bias.double()
    ours = multiply_rows(rows, weight, bias)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=2.0**-8, atol=2.0**-9 * exact.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
def test_the_cache(device: str) -> None:
    torch.manual_seed(0)
    options = {"window_frames": 6, "sink_frames": 3, "positions": "window", "ema": 0.9, "device": device}
    cache = Fp8ChunkCache(2, 1, 3, RotaryGrid(64), 2, 3, 3, dtype=torch.bfloat16, **options)
    for _ in range(3):
        cache.begin_chunk()
        k, v = torch.randn(2, 1, 18, 3, 64, device=device).bfloat16().unbind(0)
        for layer in cache.layers:
            layer.write(k, v)
        for seen, kept in zip(cache[1].past(True)[:2], (k, v), strict=True):
            assert (seen.dtype, seen.device.type) == (torch.bfloat16, device)
            place = cache[1].place()
            fresh = seen[:, place.start - place.visible_start :][:, :18].float()
            assert ((fresh - kept).abs() <= kept.abs().amax(-1, keepdim=True).float() / 16).all()
        cache.commit()
