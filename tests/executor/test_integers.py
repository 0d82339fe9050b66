"""Integer instructions against Python's own integers."""

import numpy as np
import pytest

_EDGES = {
    32: [
        0,
        1,
        2,
        3,
        5,
        31,
        32,
        33,
        63,
        64,
        0x7FFFFFFF,
        0x80000000,
        0xFFFFFFFF,
        0xFFFFFFFE,
        0x80000001,
        0xFF00FF,
    ],
    64: [0, 1, 2, 7, 63, 64, 65, 2**63 - 1, 2**63, 2**64 - 1, 2**32, 2**32 - 1, 2**63 + 1, 0xFF00FF00FF],
    16: [0, 1, 2, 15, 16, 17, 0x7FFF, 0x8000, 0xFFFF, 0xFF],
}


def _operands(bits: int, count: int, seed: int = 0) -> list[np.ndarray]:
    """All pairs of edge cases, then random numbers; unsigned."""
    rng = np.random.default_rng(seed)
    edges = np.array(_EDGES[bits], np.uint64)
    a, b = (each.ravel() for each in np.meshgrid(edges, edges))
    noise = [rng.integers(0, 2**bits, 60, np.uint64, endpoint=False) for _ in range(count)]
    columns = [
        np.concatenate([edge, each]) for edge, each in zip((a, b, rng.permutation(a)), noise, strict=False)
    ]
    return [column.astype(f"u{bits // 8}") for column in columns[:count]]


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _python(array: np.ndarray, kind: str) -> list[int]:
    bits = int(kind[1:])
    return [_signed(int(v), bits) if kind[0] == "s" else int(v) for v in array]


def _divide(a: int, b: int, kind: str) -> int:
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a: int, b: int, kind: str) -> int:
    return a if b == 0 else a - _divide(a, b, kind) * b


_BINARY = {
    "add": lambda a, b, kind: a + b,
    "sub": lambda a, b, kind: a - b,
    "mul.lo": lambda a, b, kind: a * b,
    "mul.hi": lambda a, b, kind: (a * b) >> int(kind[1:]),
    "div": _divide,
    "rem": _remainder,
    "min": lambda a, b, kind: min(a, b),
    "max": lambda a, b, kind: max(a, b),
}


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("op", list(_BINARY))
def test_binary(evaluate, op, kind):
    bits = int(kind[1:])
    a, b = _operands(bits, 2)
    got = evaluate(f"{op}.{kind} %d, %a0, %a1;", [a, b], a.dtype)
    expected = [
        _BINARY[op](x, y, kind) % 2**bits for x, y in zip(_python(a, kind), _python(b, kind), strict=True)
    ]
    assert [int(v) for v in got] == expected


@pytest.mark.parametrize("kind", ["s32", "u32", "s16", "u16"])
def test_wide_products(evaluate, kind):
    bits = int(kind[1:])
    a, b = _operands(bits, 2)
    out = f"u{bits // 4}"
    got = evaluate(f"mul.wide.{kind} %d, %a0, %a1;", [a, b], out)
    products = [x * y for x, y in zip(_python(a, kind), _python(b, kind), strict=True)]
    assert [int(v) for v in got] == [p % 2 ** (2 * bits) for p in products]
    got = evaluate(f"mad.wide.{kind} %d, %a0, %a1, -3;", [a, b], out)
    assert [int(v) for v in got] == [(p - 3) % 2 ** (2 * bits) for p in products]


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_mad(evaluate, kind):
    bits = int(kind[1:])
    a, b, c = _operands(bits, 3)
    rows = list(zip(_python(a, kind), _python(b, kind), _python(c, kind), strict=True))
    got = evaluate(f"mad.lo.{kind} %d, %a0, %a1, %a2;", [a, b, c], a.dtype)
    assert [int(v) for v in got] == [(x * y + z) % 2**bits for x, y, z in rows]
    got = evaluate(f"mad.hi.{kind} %d, %a0, %a1, %a2;", [a, b, c], a.dtype)
    assert [int(v) for v in got] == [((x * y >> bits) + z) % 2**bits for x, y, z in rows]


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize(
    ("relation", "holds"),
    [
        ("eq", lambda a, b: a == b), ("ne", lambda a, b: a != b), ("lt", lambda a, b: a < b),
        ("le", lambda a, b: a <= b), ("gt", lambda a, b: a > b), ("ge", lambda a, b: a >= b),
    ],
)  # fmt: skip
def test_setp_and_selp(evaluate, kind, relation, holds):
    a, b = _operands(int(kind[1:]), 2)
    body = f"setp.{relation}.{kind} %p1, %a0, %a1;\nselp.b32 %d, 7, 9, %p1;"
    expected = [7 if holds(x, y) else 9 for x, y in zip(_python(a, kind), _python(b, kind), strict=True)]
    assert evaluate(body, [a, b], "u4").tolist() == expected


def test_setp_combines_and_gives_both_outcomes(evaluate):
    a, b = _operands(32, 2)
    body = """
    setp.gt.u32 %p3, %a0, 31;
    setp.lt.and.s32 %p1|%p2, %a0, %a1, %p3;
    setp.lt.xor.s32 %p3, %a0, %a1, !%p3;
    selp.b32 %r1, 1, 0, %p1;
    selp.b32 %r2, 2, 0, %p2;
    selp.b32 %r3, 4, 0, %p3;
    or.b32 %r1, %r1, %r2;
    or.b32 %d, %r1, %r3;
    """
    less = np.array([x < y for x, y in zip(_python(a, "s32"), _python(b, "s32"), strict=True)])
    third = a > 31
    expected = np.where(less & third, 1, 0) + np.where(~less & third, 2, 0) + np.where(less ^ ~third, 4, 0)
    assert evaluate(body, [a, b], "u4").tolist() == expected.tolist()


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(evaluate, bits):
    a, b = _operands(bits, 2)
    for op, expected in {"and": a & b, "or": a | b, "xor": a ^ b}.items():
        np.testing.assert_array_equal(evaluate(f"{op}.b{bits} %d, %a0, %a1;", [a, b], a.dtype), expected)
    np.testing.assert_array_equal(evaluate(f"not.b{bits} %d, %a0;", [a], a.dtype), ~a)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u16"])
def test_shifts(evaluate, kind):
    bits = int(kind[1:])
    a = _operands(bits, 1)[0]
    by = np.resize(np.array([0, 1, 5, 15, 16, 31, 32, 33, 63, 64, 200, 2**32 - 1], np.uint32), a.size)
    values = _python(a, kind)
    left = [(x << min(int(s), 64)) % 2**bits for x, s in zip(values, by, strict=True)]
    right = [(x >> min(int(s), 64)) % 2**bits for x, s in zip(values, by, strict=True)]
    assert [int(v) for v in evaluate(f"shl.b{bits} %d, %a0, %a1;", [a, by], a.dtype)] == left
    assert [int(v) for v in evaluate(f"shr.{kind} %d, %a0, %a1;", [a, by], a.dtype)] == right
    for constant in (0, 3, bits - 1, bits, 100):
        expected = [(x >> constant) % 2**bits for x in values]
        assert [int(v) for v in evaluate(f"shr.{kind} %d, %a0, {constant};", [a], a.dtype)] == expected


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("side", ["l", "r"])
def test_funnel_shift(evaluate, side, mode):
    low, high = _operands(32, 2)
    by = np.resize(np.array([0, 1, 7, 31, 32, 33, 40], np.uint32), low.size)
    got = evaluate(f"shf.{side}.{mode}.b32 %d, %a0, %a1, %a2;", [low, high, by], "u4")
    for i in range(low.size):
        both = int(high[i]) << 32 | int(low[i])
        n = int(by[i]) % 32 if mode == "wrap" else min(int(by[i]), 32)
        assert int(got[i]) == ((both << n) >> 32 if side == "l" else both >> n) % 2**32


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_bit_fields(evaluate, kind):
    bits = int(kind[1:])
    a, b = _operands(bits, 2)
    rng = np.random.default_rng(1)
    start = rng.choice(np.array([0, 1, 8, 20, bits - 1, bits, 90, 255 + 256], np.uint32), a.size)
    length = rng.choice(np.array([0, 1, 5, 12, bits - 1, bits, 100, 256 + 3], np.uint32), a.size)
    got = evaluate(f"bfe.{kind} %d, %a0, %a1, %a2;", [a, start, length], a.dtype)
    for i in range(a.size):
        x, pos, size = int(a[i]), int(start[i]) % 256, int(length[i]) % 256
        sign = 0 if kind[0] == "u" or size == 0 else x >> min(pos + size - 1, bits - 1) & 1
        picked = [x >> (pos + j) & 1 if j < size and pos + j < bits else sign for j in range(bits)]
        assert int(got[i]) == sum(bit << j for j, bit in enumerate(picked))
    if kind[0] == "u":
        got = evaluate(f"bfi.b{bits} %d, %a0, %a1, %a2, %a3;", [a, b, start, length], a.dtype)
        for i in range(a.size):
            result, pos, size = int(b[i]), int(start[i]) % 256, int(length[i]) % 256
            for j in range(size):
                if pos + j < bits:
                    result = result & ~(1 << (pos + j)) | (int(a[i]) >> j & 1) << (pos + j)
            assert int(got[i]) == result


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_bit_mask(evaluate, mode):
    start, width = (
        np.resize(np.array(each, np.uint32), 64)
        for each in ([0, 1, 8, 31, 32, 33, 255], [0, 1, 5, 31, 32, 40])
    )
    got = evaluate(f"bmsk.{mode}.b32 %d, %a0, %a1;", [start, width], "u4")
    for i in range(64):
        a, b = (int(v) % 32 if mode == "wrap" else min(int(v), 32) for v in (start[i], width[i]))
        assert int(got[i]) == ((1 << b) - 1 << a) % 2**32


@pytest.mark.parametrize("bits", [32, 64])
def test_counting(evaluate, bits):
    a = _operands(bits, 1)[0]
    values = [int(v) for v in a]
    assert evaluate(f"popc.b{bits} %d, %a0;", [a], "u4").tolist() == [v.bit_count() for v in values]
    assert evaluate(f"clz.b{bits} %d, %a0;", [a], "u4").tolist() == [bits - v.bit_length() for v in values]
    top = [v.bit_length() - 1 & 0xFFFFFFFF for v in values]
    assert evaluate(f"bfind.u{bits} %d, %a0;", [a], "u4").tolist() == top
    signed = [(v if v >= 0 else ~v).bit_length() - 1 & 0xFFFFFFFF for v in _python(a, f"s{bits}")]
    assert evaluate(f"bfind.s{bits} %d, %a0;", [a], "u4").tolist() == signed
    mirrored = [int(f"{v:0{bits}b}"[::-1], 2) for v in values]
    assert [int(v) for v in evaluate(f"brev.b{bits} %d, %a0;", [a], a.dtype)] == mirrored


def test_byte_permutation(evaluate):
    a, b, s = _operands(32, 3)
    got = evaluate("prmt.b32 %d, %a0, %a1, %a2;", [a, b, s], "u4")
    for i in range(a.size):
        octets = (int(b[i]) << 32 | int(a[i])).to_bytes(8, "little")
        picked = []
        for nibble in (int(s[i]) >> 4 * j & 0xF for j in range(4)):
            octet = octets[nibble & 7]
            picked.append((0xFF if octet & 0x80 else 0) if nibble & 8 else octet)
        assert int(got[i]) == int.from_bytes(bytes(picked), "little")


@pytest.mark.parametrize("table", [0x00, 0xFF, 0x96, 0xE8, 0xCA, 0x1B])
def test_lop3(evaluate, table):
    a, b, c = _operands(32, 3)
    got = evaluate(f"lop3.b32 %d, %a0, %a1, %a2, {table};", [a, b, c], "u4")
    for i in range(a.size):
        bits = [
            table >> ((int(a[i]) >> j & 1) << 2 | (int(b[i]) >> j & 1) << 1 | int(c[i]) >> j & 1) & 1
            for j in range(32)
        ]
        assert int(got[i]) == sum(bit << j for j, bit in enumerate(bits))


def test_negate_abs_and_saturate(evaluate):
    a, b = _operands(32, 2)
    values, others = _python(a, "s32"), _python(b, "s32")
    assert [int(v) for v in evaluate("neg.s32 %d, %a0;", [a], "u4")] == [-v % 2**32 for v in values]
    assert [int(v) for v in evaluate("abs.s32 %d, %a0;", [a], "u4")] == [abs(v) % 2**32 for v in values]
    sums = [max(-(2**31), min(2**31 - 1, x + y)) for x, y in zip(values, others, strict=True)]
    assert evaluate("add.sat.s32 %d, %a0, %a1;", [a, b], "i4").tolist() == sums


def test_carry_chain(evaluate):
    a, b = _operands(64, 2)
    body = """
    mov.b64 {%r1, %r2}, %a0;
    mov.b64 {%r3, %r4}, %a1;
    OP.cc.u32 %r5, %r1, %r3;
    OPc.u32 %r6, %r2, %r4;
    mov.b64 %d, {%r5, %r6};
    """
    np.testing.assert_array_equal(evaluate(body.replace("OP", "add"), [a, b], "u8"), a + b)
    np.testing.assert_array_equal(evaluate(body.replace("OP", "sub"), [a, b], "u8"), a - b)


def test_product_of_64_bits_by_words_of_32(evaluate):
    a, b = _operands(64, 2)
    body = """
    mov.b64 {%r1, %r2}, %a0;
    mov.b64 {%r3, %r4}, %a1;
    mul.lo.u32 %r5, %r1, %r3;
    mul.hi.u32 %r6, %r1, %r3;
    mad.lo.cc.u32 %r6, %r1, %r4, %r6;
    madc.hi.u32 %r7, %r1, %r4, 0;
    mad.lo.cc.u32 %r6, %r2, %r3, %r6;
    madc.hi.cc.u32 %r7, %r2, %r3, %r7;
    addc.u32 %r8, 0, 0;
    mad.lo.cc.u32 %r7, %r2, %r4, %r7;
    madc.hi.u32 %r8, %r2, %r4, %r8;
    mov.b64 %d, {HALF};
    """
    products = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    low = evaluate(body.replace("HALF", "%r5, %r6"), [a, b], "u8")
    assert [int(v) for v in low] == [p % 2**64 for p in products]
    high = evaluate(body.replace("HALF", "%r7, %r8"), [a, b], "u8")
    assert [int(v) for v in high] == [p >> 64 for p in products]


def test_dp4a(evaluate):
    a, b, c = _operands(32, 3)
    got = evaluate("dp4a.s32.u32 %d, %a0, %a1, %a2;", [a, b, c], "u4")
    x = a.view(np.int8).reshape(-1, 4).astype(np.int64)
    y = b.view(np.uint8).reshape(-1, 4).astype(np.int64)
    np.testing.assert_array_equal(got, ((x * y).sum(1) + c).astype(np.uint32))


def test_pack_and_unpack(evaluate):
    a = _operands(64, 1)[0]
    body = """
    mov.b64 {%r1, %r2}, %a0;
    mov.b32 {%h1, %h2}, %r1;
    mov.b32 %r3, {%h2, %h1};
    mov.b64 %d, {%r2, %r3};
    """
    halves = a.view(np.uint16).reshape(-1, 4)
    expected = np.ascontiguousarray(halves[:, [2, 3, 1, 0]]).view(np.uint64)[:, 0]
    np.testing.assert_array_equal(evaluate(body, [a], "u8"), expected)
