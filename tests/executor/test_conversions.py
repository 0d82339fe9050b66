"""cvt against torch and exact arithmetic."""

import numpy as np
import pytest
import torch

from ptx_executor import UnsupportedInstruction

INTEGERS = {
    "s8": (-(2**7), 2**7 - 1),
    "u8": (0, 2**8 - 1),
    "s16": (-(2**15), 2**15 - 1),
    "u16": (0, 2**16 - 1),
}
INTEGERS |= {
    "s32": (-(2**31), 2**31 - 1),
    "u32": (0, 2**32 - 1),
    "s64": (-(2**63), 2**63 - 1),
    "u64": (0, 2**64 - 1),
}


def _values() -> np.ndarray:
    rng = np.random.default_rng(0)
    special = [
        0,
        -0.0,
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        1e10,
        -1e10,
        3e19,
        -3e19,
        np.inf,
        -np.inf,
        np.nan,
        2.0**31,
        2.0**63,
    ]
    return np.concatenate([special, rng.standard_normal(100) * 2.0 ** rng.integers(-4, 40, 100)]).astype(
        np.float32
    )


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize(
    ("mode", "function"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_float_to_integer_clamps(evaluate, kind, mode, function):
    x = _values()
    low, high = INTEGERS[kind]
    bits = int(kind[1:])
    got = evaluate(f"cvt.{mode}.{kind}.f32 %d, %a0;", [x], f"u{bits // 8}")
    for value, result in zip(x, got, strict=True):
        if np.isnan(value):
            expected = 0
        elif np.isinf(value):
            expected = high if value > 0 else low
        else:
            expected = max(low, min(high, int(function(np.float64(value)))))
        assert int(result) == expected % 2**bits, value


@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
def test_integer_to_float(evaluate, source):
    bits = int(source[1:])
    rng = np.random.default_rng(0)
    raw = np.concatenate(
        [rng.integers(0, 2**bits, 200, np.uint64), np.array([0, 1, 2**bits - 1, 2 ** (bits - 1)], np.uint64)]
    )
    raw = raw.astype(f"u{bits // 8}")
    typed = raw.view(f"{'i' if source[0] == 's' else 'u'}{bits // 8}")
    for kind, dtype in (("f32", np.float32), ("f64", np.float64)):
        got = evaluate(f"cvt.rn.{kind}.{source} %d, %a0;", [raw], dtype)
        np.testing.assert_array_equal(
            got, np.array([float(int(v)) if dtype is np.float64 else dtype(int(v)) for v in typed])
        )


@pytest.mark.parametrize("source", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_to_integer(evaluate, source, kind):
    width = max(int(source[1:]) // 8, 2)
    raw = np.random.default_rng(0).integers(0, 2 ** (8 * width), 100, np.uint64).astype(f"u{width}")
    bits, out = int(source[1:]), int(kind[1:])
    values = [int(v) % 2**bits for v in raw]
    values = [v - 2**bits if source[0] == "s" and v >> (bits - 1) else v for v in values]
    got = evaluate(f"cvt.{kind}.{source} %d, %a0;", [raw], f"u{out // 8}")
    assert [int(v) for v in got] == [v % 2**out for v in values]
    low, high = INTEGERS[kind]
    got = evaluate(f"cvt.sat.{kind}.{source} %d, %a0;", [raw], f"u{out // 8}")
    assert [int(v) for v in got] == [max(low, min(high, v)) % 2**out for v in values]


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_halves_and_float32(evaluate, kind, dtype):
    x = np.concatenate(
        [_values(), np.random.default_rng(1).integers(0, 2**32, 300, np.uint32).view(np.float32)]
    )
    expected = torch.from_numpy(x).to(dtype)
    got = torch.from_numpy(evaluate(f"cvt.rn.{kind}.f32 %d, %a0;", [x], "u2").view(np.int16)).view(dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    bits = expected.view(torch.int16).numpy().view(np.uint16)
    back = evaluate(f"cvt.f32.{kind} %d, %a0;", [bits], "f4")
    np.testing.assert_array_equal(back, expected.float().numpy())


@pytest.mark.parametrize(("kind", "dtype"), [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
def test_packing_two_floats(evaluate, kind, dtype):
    high, low = _values(), np.roll(_values(), 5)
    got = evaluate(f"cvt.rn.{kind}.f32 %d, %a0, %a1;", [high, low], "u4").view(np.int16).reshape(-1, 2)
    for column, values in ((0, low), (1, high)):
        halves = torch.from_numpy(np.ascontiguousarray(got[:, column])).view(dtype)
        torch.testing.assert_close(halves, torch.from_numpy(values).to(dtype), rtol=0, atol=0, equal_nan=True)
    relu = evaluate(f"cvt.rn.relu.{kind}.f32 %d, %a0, %a1;", [high, low], "u4").view(np.int16).reshape(-1, 2)
    values = torch.from_numpy(np.ascontiguousarray(relu[:, 1])).view(dtype)
    torch.testing.assert_close(
        values, torch.from_numpy(high).to(dtype).relu(), rtol=0, atol=0, equal_nan=True
    )


def test_float64_and_float32(evaluate):
    x = np.concatenate([_values().astype(np.float64), np.random.default_rng(0).standard_normal(100) * np.pi])
    near = evaluate("cvt.rn.f32.f64 %d, %a0;", [x], "f4")
    np.testing.assert_array_equal(near, x.astype(np.float32))
    down = evaluate("cvt.rm.f32.f64 %d, %a0;", [x], "f4")
    finite = np.isfinite(x)
    assert (down[finite].astype(np.float64) <= x[finite]).all()
    assert (np.nextafter(down[finite], np.float32(np.inf)).astype(np.float64) > x[finite]).all()
    np.testing.assert_array_equal(evaluate("cvt.f64.f32 %d, %a0;", [near], "f8"), near.astype(np.float64))


def test_rounding_to_integral_floats(evaluate):
    x = _values()
    np.testing.assert_array_equal(evaluate("cvt.rmi.f32.f32 %d, %a0;", [x], "f4"), np.floor(x))
    np.testing.assert_array_equal(evaluate("cvt.rni.ftz.f32.f32 %d, %a0;", [x], "f4"), np.rint(x))
    saturated = np.nan_to_num(np.clip(x, 0, 1))
    np.testing.assert_array_equal(evaluate("cvt.sat.f32.f32 %d, %a0;", [x], "f4"), saturated)


def test_tf32_keeps_ten_bits(evaluate):
    x = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    got = evaluate("cvt.rna.tf32.f32 %d, %a0;", [x], "u4").view(np.float32)
    assert (got.view(np.uint32) & 0x1FFF == 0).all()
    step = 2.0 ** (np.floor(np.log2(np.abs(x.astype(np.float64)))) - 10)
    assert (np.abs(got.astype(np.float64) - x) <= step / 2).all()


def _every_fp8() -> torch.Tensor:
    """Every number of e4m3, the middles between neighbours and the float32 numbers around all of them."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = numbers[numbers.isfinite()].sort().values
    points = torch.cat([finite, (finite[1:] + finite[:-1]) / 2])
    around = [torch.nextafter(points, torch.full_like(points, end)) for end in (-torch.inf, torch.inf)]
    special = torch.tensor([0.0, -0.0, 449, 464, 480, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, 1e-45])
    return torch.cat([points, *around, special, torch.from_numpy(_values())])


@pytest.mark.parametrize("relu", ["", ".relu"])
def test_fp8_against_torch(evaluate, relu):
    """All 256 numbers come back; what lies between goes to the nearest, ties to even; the rest saturates."""
    values = _every_fp8()
    for low in values.split(1024):
        high = low.flip(0)
        got = evaluate(
            f"cvt.rn.satfinite{relu}.e4m3x2.f32 %d, %a0, %a1;", [high.numpy(), low.numpy()], "u2"
        ).view(np.uint8)
        for column, part in ((0, low), (1, high)):
            clamped = part.clamp(0 if relu else -448, 448)
            expected = clamped.to(torch.float8_e4m3fn).view(torch.uint8)
            expected = torch.where(part.isnan(), torch.full_like(expected, 0x7F), expected)
            zeros = clamped == 0  # of the sign of a zero that relu makes nothing is said
            ours = torch.from_numpy(got.reshape(-1, 2)[:, column].copy())
            assert torch.equal(ours[~zeros], expected[~zeros])
            assert (ours[zeros] & 0x7F == 0).all()
            if not relu:
                assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "text", ["cvt.rn.e4m3x2.f32 %d, %a0, %a1;", "cvt.rz.satfinite.e4m3x2.f32 %d, %a0, %a1;"]
)
def test_fp8_that_no_gpu_has_is_refused(evaluate, text):
    with pytest.raises(UnsupportedInstruction, match="of FP8 there is"):
        evaluate(text, [np.ones(4, "f4"), np.ones(4, "f4")], "u2")
