"""`cvt`: conversions between integer and float types, with rounding and saturation."""

from __future__ import annotations

import numpy as np

from .arithmetic import directed, flush, saturate
from .dtypes import NUMPY, Array, bf16_to_f32, f32_to_bf16, f32_to_tf32, f64_to_bf16, is_float

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_integer(values: Array, kind: str, mode: str) -> Array:
    """Round to an integer type; out of range goes to its nearest end, NaN to 0."""
    whole = _TO_INTEGER[mode](values.astype(np.float64))
    target = NUMPY[kind]
    low, high = np.iinfo(target).min, np.iinfo(target).max
    # The ends are put in as integers: 2^64 - 1 and 2^63 - 1 are no float64.
    inside = (whole >= float(low)) & (whole < float(high))
    result = np.where(inside, whole, 0.0).astype(target)
    result = np.where(whole >= float(high), target.type(high), result)
    result = np.where(whole < float(low), target.type(low), result)
    return np.where(np.isnan(values), target.type(0), result)


def integer_to_float(values: Array, kind: str, mode: str) -> Array:
    """An integer to f16, bf16, f32 or f64, rounded once."""
    if kind == "f64":
        return values.astype(np.float64)
    if values.dtype.itemsize == 8 and kind in ("f16", "bf16"):
        # To odd: the bits that float64 drops are kept as one sticky bit.
        values = np.clip(values, -(2**52) if values.dtype.kind == "i" else 0, 2**52)
    if kind == "f16":
        return values.astype(np.float64).astype(np.float16)
    if kind == "bf16":
        return f64_to_bf16(values.astype(np.float64))
    if mode == "rn":
        return values.astype(np.float32)
    return directed(values.astype(np.float64), mode)


def float_to_float(
    values: Array, source: str, kind: str, mode: str, ftz: bool, sat: bool, relu: bool
) -> Array:
    """Between float types; without a rounding mode the target is as wide or wider.

    Within one type `mode` may ask for an integral value.
    """
    wide = bf16_to_f32(values) if source == "bf16" else values
    if source == "f16":
        wide = wide.astype(np.float32)
    if ftz and wide.dtype == np.float32:
        wide = flush(wide)
    if mode in _TO_INTEGER:
        wide = _TO_INTEGER[mode](wide)
    if sat:
        wide = saturate(wide)
    if relu:
        wide = np.where(wide < 0, wide.dtype.type(0), wide)
    if kind == "f64":
        return wide.astype(np.float64)
    if kind == "f32":
        is_directed = wide.dtype == np.float64 and mode in ("rz", "rm", "rp")
        narrow = directed(wide.astype(np.float64), mode) if is_directed else wide.astype(np.float32)
        return flush(narrow) if ftz else narrow
    return _to_half(wide, kind, mode)


def _to_half(wide: Array, kind: str, mode: str) -> Array:
    if kind == "f16":
        near = wide.astype(np.float16)
        if mode in ("rz", "rm", "rp"):
            ends = {"rz": np.float16(0), "rm": np.float16(-np.inf), "rp": np.float16(np.inf)}
            too_far = {
                "rz": np.abs(near.astype(np.float64)) > np.abs(wide),
                "rm": near.astype(np.float64) > wide,
                "rp": near.astype(np.float64) < wide,
            }
            return np.where(too_far[mode], np.nextafter(near, ends[mode]), near)
        return near
    if mode == "rz":
        bits = np.ascontiguousarray(wide, np.float32).view(np.uint32) >> np.uint32(16)
        return np.where(np.isnan(wide), np.uint16(0x7FFF), bits.astype(np.uint16))
    return f64_to_bf16(wide) if wide.dtype == np.float64 else f32_to_bf16(wide)


def to_tf32(values: Array, away: bool) -> Array:
    """float32 to tf32, as its bits: to nearest, ties away from zero (`.rna`) or to even (`.rn`)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = np.uint32(0x1000) if away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    rounded = f32_to_tf32((bits + half).view(np.float32)).view(np.uint32)
    return np.where(np.isfinite(values), rounded, bits)


def convert(
    values: Array, source: str, kind: str, mode: str, ftz: bool = False, sat: bool = False, relu: bool = False
) -> Array:
    """`cvt.mode.kind.source`; values and result in the numpy types of the PTX types."""
    if is_float(source) and is_float(kind):
        return float_to_float(values, source, kind, mode, ftz, sat, relu)
    if is_float(source):
        wide = bf16_to_f32(values) if source == "bf16" else values
        wide = flush(wide) if ftz and wide.dtype == np.float32 else wide
        return float_to_integer(wide, kind, mode)
    if is_float(kind):
        return integer_to_float(values, kind, mode)
    if sat:
        limits = np.iinfo(NUMPY[kind])
        low, high = (
            max(int(limits.min), int(np.iinfo(values.dtype).min)),
            min(limits.max, np.iinfo(values.dtype).max),
        )
        values = np.clip(values, values.dtype.type(low), values.dtype.type(high))
    return values.astype(NUMPY[kind])


def pack_halves(high: Array, low: Array, kind: str, mode: str, relu: bool) -> Array:
    """`cvt.mode.{f16x2, bf16x2}.f32 d, high, low`: two float32 to one packed register, as uint32."""
    parts = [
        _to_half(np.where(v < 0, np.float32(0), v) if relu else v, kind.removesuffix("x2"), mode)
        for v in (high, low)
    ]
    top, bottom = (part.view(np.uint16).astype(np.uint32) for part in parts)
    return (top << np.uint32(16)) | bottom


def pack_e4m3(high: Array, low: Array, relu: bool) -> Array:
    """`cvt.rn.satfinite{.relu}.e4m3x2.f32 d, high, low`: two float32 to two bytes, as uint16."""
    top, bottom = (_to_e4m3(np.maximum(v, np.float32(0)) if relu else v) for v in (high, low))
    return (top << np.uint16(8)) | bottom


def _to_e4m3(values: Array) -> Array:
    """To the nearest number of e4m3, ties to even, past 448 to 448; NaN becomes 0x7f as on the GPU."""
    nan = np.isnan(values)
    wide = np.minimum(np.where(nan, 0, np.abs(values.astype(np.float64))), 448.0)
    _, exponent = np.frexp(wide)  # wide = m * 2^exponent with m in [1/2, 1)
    step = np.exp2(np.maximum(exponent, -5) - 4.0)  # 2^-9 below 2^-6
    rounded = np.rint(wide / step) * step  # may reach the next power of two
    mantissa, exponent = np.frexp(rounded)
    code = np.where(rounded < 2.0**-6, rounded * 512, (exponent + 6) * 8 + (2 * mantissa - 1) * 8)
    signed = code.astype(np.uint16) | (np.signbit(values).astype(np.uint16) << np.uint16(7))
    return np.where(nan, np.uint16(0x7F), signed)
