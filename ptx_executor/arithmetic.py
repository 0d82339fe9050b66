"""What the arithmetic instructions compute, on numpy arrays.

float32 and float16 arithmetic is that of IEEE, fma included. The `.approx` functions are as exact as numpy's,
which is a little better than the GPU's; only `tanh.approx` is cut to the 11 bits that the GPU promises.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .dtypes import Array, f32_to_bf16, f64_to_bf16

F32, F64 = np.float32, np.float64
_TINY = np.array([np.finfo(F32).tiny], F32)
_HALF, _HALF_MASK = np.uint64(1 << 28), np.uint64((1 << 29) - 1)  # the bits of float64 below those of float32

# Floats.


def flush(values: Array) -> Array:
    """`.ftz`: subnormal float32 to zero of the same sign."""
    return np.where(np.abs(values) < _TINY, np.copysign(F32(0), values), values)


def saturate(values: Array) -> Array:
    """`.sat`: clamp to [0, 1]; NaN becomes 0."""
    kind = values.dtype.type
    return np.where(np.isnan(values), kind(0), np.clip(values, kind(0), kind(1)))


def directed(values: NDArray[np.float64], mode: str) -> NDArray[np.float32]:
    """float64 to float32, rounded to zero (rz), down (rm) or up (rp)."""
    near = values.astype(F32)
    zero, inf = F32(0), F32(np.inf)
    if mode == "rz":
        return np.where(np.abs(near) > np.abs(values), np.nextafter(near, zero), near)
    if mode == "rm":
        return np.where(near > values, np.nextafter(near, -inf), near)
    return np.where(near < values, np.nextafter(near, inf), near)


def add_odd(a: Array, b: Array) -> NDArray[np.float64]:
    """a + b in float64, rounded 'to odd': a second rounding, to 24 bits or fewer, is then the right one."""
    a, b = a.astype(F64), b.astype(F64)
    total = a + b
    # What the rounding left out (Knuth's TwoSum).
    part = total - a
    rest = (a - (total - part)) + (b - part)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    step = even & (rest != 0) & np.isfinite(rest)
    return np.where(step, np.nextafter(total, np.copysign(np.inf, rest)), total)


def fma_odd(a: Array, b: Array, c: Array) -> NDArray[np.float64]:
    """a * b + c of floats of 24 bits or fewer in float64, rounded to odd; the product is exact."""
    return add_odd(np.multiply(a, b, dtype=F64), c)


def fma_f32(a: Array, b: Array, c: Array) -> NDArray[np.float32]:
    """a * b + c, rounded once."""
    total = np.add(np.multiply(a, b, dtype=F64), c, dtype=F64)
    # The rounding to float64 matters only where it lands half way between two float32.
    doubtful = (total.view(np.uint64) & _HALF_MASK) == _HALF
    doubtful |= (np.abs(total) < _TINY) & (total != 0)
    if doubtful.any():
        total = fma_odd(a, b, c)
    return total.astype(F32)


def fma_f64(a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    """a * b + c rounded once: numpy's long double where that is wider, else twice."""
    wide = np.longdouble
    return (a.astype(wide) * b + c).astype(F64)


def sub_odd(a: Array, b: Array) -> NDArray[np.float64]:
    return add_odd(a, -b)


def mul_wide(a: Array, b: Array) -> NDArray[np.float64]:
    return np.multiply(a, b, dtype=F64)


def div_wide(a: Array, b: Array) -> NDArray[np.float64]:
    return np.divide(a, b, dtype=F64)


def sqrt_wide(a: Array) -> NDArray[np.float64]:
    return np.sqrt(a, dtype=F64)


def rcp(a: Array) -> Array:
    return np.divide(a.dtype.type(1), a)


def rsqrt(a: Array) -> Array:
    return np.divide(1.0, np.sqrt(a, dtype=F64)).astype(a.dtype)


def tanh_approx(a: NDArray[np.float32]) -> NDArray[np.float32]:
    """tanh to 11 bits: relative error up to 2^-11, as on the GPU."""
    bits = np.tanh(a).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(F32)


def fmin_nan(a: Array, b: Array) -> Array:
    return np.minimum(a, b)


def fmax_nan(a: Array, b: Array) -> Array:
    return np.maximum(a, b)


def f64_to_f16(values: Array) -> Array:
    return values.astype(np.float16)


def narrow_f16(values: Array) -> Array:
    """float32 or float64 to float16, to nearest."""
    return values.astype(np.float16)


def narrow_bf16(values: Array) -> NDArray[np.uint16]:
    """float32 or float64 to bfloat16, to nearest."""
    return f64_to_bf16(values) if values.dtype == F64 else f32_to_bf16(values)


def widen_f16(values: Array) -> NDArray[np.float32]:
    return values.astype(F32)


def testp(values: Array, what: str) -> NDArray[np.bool_]:
    """finite, infinite, number, notanumber, normal, subnormal."""
    tiny = np.finfo(values.dtype).tiny
    small = np.abs(values) < tiny
    answers = {
        "finite": lambda: np.isfinite(values),
        "infinite": lambda: np.isinf(values),
        "number": lambda: ~np.isnan(values),
        "notanumber": lambda: np.isnan(values),
        "normal": lambda: np.isfinite(values) & ~small,
        "subnormal": lambda: small & (values != 0),
    }
    return answers[what]()


# Integers.


def int_div(a: Array, b: Array) -> Array:
    """Quotient rounded to zero; x / 0 is all ones, as on the GPU (PTX leaves it open)."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, ~np.zeros_like(a), quotient).astype(a.dtype)


def int_rem(a: Array, b: Array) -> Array:
    """Remainder with the sign of `a`; x rem 0 is x."""
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b))).astype(a.dtype)


def mul_hi(a: Array, b: Array) -> Array:
    """Upper half of the product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (np.multiply(a, b, dtype=wide) >> wide(bits)).astype(a.dtype)
    x, y = np.broadcast_arrays(a.view(np.uint64), b.view(np.uint64))
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    carried = (middle & low) + x0 * y1
    high = x1 * y1 + (middle >> half) + (carried >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def widen(a: Array, b: Array) -> Array:
    """Product of twice the width."""
    return np.multiply(a, b, dtype=np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}"))


def add_sat(a: NDArray[np.int32], b: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.clip(np.add(a, b, dtype=np.int64), -(2**31), 2**31 - 1).astype(np.int32)


def sub_sat(a: NDArray[np.int32], b: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.clip(np.subtract(a, b, dtype=np.int64), -(2**31), 2**31 - 1).astype(np.int32)


def shift_left(a: Array, b: NDArray[np.uint32]) -> Array:
    bits = a.dtype.itemsize * 8
    shifted = a << np.minimum(b, bits - 1).astype(a.dtype)
    return np.where(b >= bits, a.dtype.type(0), shifted)


def shift_right(a: Array, b: NDArray[np.uint32]) -> Array:
    """Arithmetic for signed types, logical for the others."""
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(b >= bits, a.dtype.type(0), shifted)


def funnel_shift(low: Array, high: Array, by: Array, left: bool, wrap: bool) -> NDArray[np.uint32]:
    """`shf`: 32 bits out of high:low shifted."""
    count = (by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    if left:
        return ((both << count) >> np.uint64(32)).astype(np.uint32)
    return (both >> count).astype(np.uint32)


def bit_field_extract(a: Array, start: Array, length: Array) -> Array:
    bits = a.dtype.itemsize * 8
    start = (start & np.uint32(0xFF)).astype(np.int64)
    length = (length & np.uint32(0xFF)).astype(np.int64)
    field = shift_right(a, np.minimum(start, bits).astype(np.uint32))
    kept = np.minimum(length, bits)
    if a.dtype.kind == "i":
        # The sign of a field that leaves the register, or that fills it, is the register's.
        kept = np.where(start + kept > bits, np.maximum(bits - start, 1), kept)
    spare = (bits - kept).astype(np.uint32)
    field = shift_right(shift_left(field, spare), spare)
    return np.where(length == 0, a.dtype.type(0), field)


def bit_field_insert(field: Array, into: Array, start: Array, length: Array) -> Array:
    kind, bits = into.dtype.type, into.dtype.itemsize * 8
    start = np.minimum(start & np.uint32(0xFF), bits).astype(np.uint32)
    length = np.minimum(length & np.uint32(0xFF), bits).astype(np.uint32)
    ones = shift_right(~np.zeros_like(into), (bits - length).astype(np.uint32))
    ones = np.where(length == 0, kind(0), ones)
    mask = shift_left(ones, start)
    return (into & ~mask) | (shift_left(field, start) & mask)


def bit_mask(start: Array, width: Array, wrap: bool) -> NDArray[np.uint32]:
    """`bmsk`: `width` ones from bit `start` on; both are taken modulo 32 (`wrap`) or up to 32 (`clamp`)."""
    if wrap:
        start, width = start & np.uint32(31), width & np.uint32(31)
    ones = (np.uint64(1) << np.minimum(width, np.uint32(32)).astype(np.uint64)) - np.uint64(1)
    return (ones << np.minimum(start, np.uint32(32)).astype(np.uint64)).astype(np.uint32)


def permute_bytes(a: Array, b: Array, selector: Array) -> NDArray[np.uint32]:
    """`prmt` in its default mode: bytes of b:a picked by the nibbles of `selector`, or their sign."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(0xF)
        byte = (both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint8)
        sign = (byte.view(np.int8) >> 7).view(np.uint8)
        picked = np.where(nibble >= 8, sign, byte)
        result |= picked.astype(np.uint32) << np.uint32(8 * i)
    return result


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """Any bitwise function of three operands, given by its truth table."""
    result = np.zeros(np.broadcast(a, b, c).shape, a.dtype)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def popcount(a: Array) -> NDArray[np.uint32]:
    return np.bitwise_count(a).astype(np.uint32)


def highest_bit(a: Array) -> NDArray[np.int64]:
    """Index of the highest set bit of unsigned values; -1 for zero."""
    found = np.full(a.shape, -1, np.int64)
    rest = a.astype(np.uint64)
    for step in (32, 16, 8, 4, 2, 1):
        large = rest >= (np.uint64(1) << np.uint64(step))
        found += np.where(large, step, 0)
        rest = np.where(large, rest >> np.uint64(step), rest)
    return found + (a != 0)


def leading_zeros(a: Array) -> NDArray[np.uint32]:
    return (a.dtype.itemsize * 8 - 1 - highest_bit(a)).astype(np.uint32)


def find_leading(a: Array, amount: bool) -> NDArray[np.uint32]:
    """`bfind`: position of the highest bit (of the highest that is not the sign, for signed); all ones if
    none.
    """
    bits = a.view(np.dtype(f"u{a.dtype.itemsize}"))
    if a.dtype.kind == "i":
        bits = np.where(a < 0, ~bits, bits)
    at = highest_bit(bits)
    if amount:
        at = np.where(at < 0, -1, a.dtype.itemsize * 8 - 1 - at)
    return at.astype(np.int32).view(np.uint32)


def reverse_bits(a: Array) -> Array:
    octets = np.ascontiguousarray(a).view(np.uint8).reshape(-1, a.dtype.itemsize)
    flipped = np.packbits(np.unpackbits(octets, axis=1, bitorder="little"), axis=1, bitorder="big")
    return np.ascontiguousarray(flipped[:, ::-1]).view(a.dtype)[:, 0]


def dot_bytes(a: Array, b: Array, c: Array, a_signed: bool, b_signed: bool) -> Array:
    """`dp4a`: four byte products, added to `c`."""
    size = np.broadcast(a, b, c).size
    x, y = (np.ascontiguousarray(np.broadcast_to(v, (size,))) for v in (a, b))
    x8 = x.view(np.int8 if a_signed else np.uint8).reshape(-1, 4).astype(np.int32)
    y8 = y.view(np.int8 if b_signed else np.uint8).reshape(-1, 4).astype(np.int32)
    return (x8 * y8).sum(1, dtype=np.int32).view(c.dtype) + c


def compare(kind: str, a: Array, b: Array) -> NDArray[np.bool_]:
    """The comparisons that also hold when an operand is NaN (`ltu` and so on), and `num`, `nan`."""
    if kind == "num":
        return ~(np.isnan(a) | np.isnan(b))
    if kind == "nan":
        return np.isnan(a) | np.isnan(b)
    opposite = {"equ": np.not_equal, "neu": np.equal, "ltu": np.greater_equal, "leu": np.greater}
    opposite |= {"gtu": np.less_equal, "geu": np.less}
    if kind == "equ":
        return np.equal(a, b) | np.isnan(a) | np.isnan(b)
    return ~opposite[kind](a, b)


def not_equal_ordered(a: Array, b: Array) -> NDArray[np.bool_]:
    """`ne` of floats, which is false when an operand is NaN."""
    return (a < b) | (a > b)
