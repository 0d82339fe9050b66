"""Float instructions against exact fractions, numpy and torch."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1.5,
    np.inf,
    -np.inf,
    np.nan,
    1e-40,
    -1e-40,
    3.4e38,
    -3.4e38,
    1e-20,
    2.0**-126,
]


def _floats(count: int, kind: str = "f4", seed: int = 0) -> list[np.ndarray]:
    """All pairs of special values, then random ones of many sizes."""
    rng = np.random.default_rng(seed)
    special = np.array(SPECIAL)
    a, b = (each.ravel() for each in np.meshgrid(special, special))
    columns = [a, b, rng.permutation(a)]
    noise = [rng.standard_normal(150) * 2.0 ** rng.integers(-12, 12, 150) for _ in columns]
    with np.errstate(over="ignore"):
        return [np.concatenate(pair).astype(kind) for pair in zip(columns, noise, strict=True)][:count]


def _nearest_f32(value: Fraction) -> np.float32:
    """float32 nearest to a fraction, ties to even."""
    guess = np.float32(float(value))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    finite = [each for each in around if np.isfinite(each)]
    return min(finite, key=lambda each: (abs(Fraction(float(each)) - value), int(each.view(np.uint32)) & 1))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_ieee_arithmetic(evaluate, kind):
    dtype = f"f{int(kind[1:]) // 8}"
    a, b = _floats(2, dtype)
    with np.errstate(all="ignore"):
        cases = {
            "add.{}": a + b, "sub.{}": a - b, "mul.{}": a * b, "div.rn.{}": a / b,
            "min.{}": np.fmin(a, b), "max.{}": np.fmax(a, b),
        }  # fmt: skip
        for op, expected in cases.items():
            got = evaluate(f"{op.format(kind)} %d, %a0, %a1;", [a, b], dtype)
            np.testing.assert_array_equal(got, expected, op)
        cases = {"sqrt.rn.{}": np.sqrt(a), "rcp.rn.{}": 1 / a, "neg.{}": -a, "abs.{}": np.abs(a)}
        for op, expected in cases.items():
            np.testing.assert_array_equal(evaluate(f"{op.format(kind)} %d, %a0;", [a], dtype), expected, op)
    got = evaluate(f"copysign.{kind} %d, %a0, %a1;", [a, b], dtype)
    np.testing.assert_array_equal(got, np.copysign(b, a))


def test_fma_rounds_once(evaluate):
    a, b, c = (each[225:] for each in _floats(3))
    # Products whose low bits decide, too: c close to -a * b.
    c = np.where(np.arange(a.size) % 2, c, -(a * b)).astype(np.float32)
    got = evaluate("fma.rn.f32 %d, %a0, %a1, %a2;", [a, b, c], "f4")
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)
    ]
    np.testing.assert_array_equal(got, np.array([_nearest_f32(value) for value in exact]))
    assert (got != a * b + c).any()


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_fma_is_exact_where_float64_is_not(evaluate, mode):
    """a * b lies on a float32 or half way between two, and c decides from below the last bit of float64."""
    a = np.array([1 + 2**-12, 1 + 2**-12, 1, 1, -1, 2.0**-75, 2.0**-75, 1, 2.0**-100], np.float32)
    b = np.array([1 + 2**-12, 1 + 2**-12, 1, 1, 1, 2.0**-75, 2.0**-75, 0, 2.0**-100], np.float32)
    c = np.array(
        [2.0**-80, -(2.0**-80), 2.0**-80, -(2.0**-80), 2.0**-80, 1, -1, 2.0**-149, 1e-45], np.float32
    )
    a, b, c = (np.resize(each, 64) for each in (a, b, c))
    got = evaluate(f"fma.{mode}.f32 %d, %a0, %a1, %a2;", [a, b, c], "f4")
    for i, value in enumerate(got):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        near = _nearest_f32(exact)
        if mode == "rn":
            assert value == near
            continue
        around = sorted(
            {float(np.nextafter(near, np.float32(end))) for end in (-np.inf, np.inf)} | {float(near)}
        )
        below = max(each for each in around if Fraction(each) <= exact)
        above = min(each for each in around if Fraction(each) >= exact)
        assert value == {"rm": below, "rp": above, "rz": below if exact > 0 else above}[mode]


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(evaluate, mode):
    a, b, c = (each[225:] for each in _floats(3))
    for op in ("add", "mul", "fma"):
        inputs = [a, b, c] if op == "fma" else [a, b]
        arguments = ", ".join(f"%a{i}" for i in range(len(inputs)))
        got = evaluate(f"{op}.{mode}.f32 %d, {arguments};", inputs, "f4")
        for i, value in enumerate(got):
            x, y = Fraction(float(a[i])), Fraction(float(b[i]))
            exact = {"add": x + y, "mul": x * y, "fma": x * y + Fraction(float(c[i]))}[op]
            below = exact >= 0 if mode == "rz" else mode == "rm"
            other = np.nextafter(value, np.float32(np.inf if below else -np.inf))
            low, high = sorted([Fraction(float(value)), Fraction(float(other))])
            assert (Fraction(float(value)) == exact) or (low < exact < high)


def test_flush_to_zero_and_saturate(evaluate):
    a, b = _floats(2)
    got = evaluate("mul.ftz.f32 %d, %a0, 0f3F800000;", [a], "f4")
    np.testing.assert_array_equal(got, np.where(np.abs(a) < 2.0**-126, np.copysign(np.float32(0), a), a))
    got = evaluate("add.sat.f32 %d, %a0, %a1;", [a, b], "f4")
    with np.errstate(invalid="ignore", over="ignore"):
        np.testing.assert_array_equal(got, np.nan_to_num(np.clip(a + b, 0, 1)))


def test_nan_variants_of_min_and_max(evaluate):
    a, b = _floats(2)
    np.testing.assert_array_equal(evaluate("max.NaN.f32 %d, %a0, %a1;", [a, b], "f4"), np.maximum(a, b))
    np.testing.assert_array_equal(evaluate("min.NaN.f32 %d, %a0, %a1;", [a, b], "f4"), np.minimum(a, b))


@pytest.mark.parametrize(
    "relation", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_comparisons_with_nan(evaluate, relation):
    a, b = _floats(2)
    got = evaluate(f"setp.{relation}.f32 %p1, %a0, %a1;\nselp.b32 %d, 1, 0, %p1;", [a, b], "u4")
    plain = {
        "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y,
        "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
    }  # fmt: skip
    for i in range(a.size):
        x, y = float(a[i]), float(b[i])
        unordered = math.isnan(x) or math.isnan(y)
        if relation in ("num", "nan"):
            expected = unordered == (relation == "nan")
        else:
            expected = (
                (relation.endswith("u") and relation != "u") if unordered else plain[relation[:2]](x, y)
            )
        assert got[i] == expected, (x, y)


@pytest.mark.parametrize(
    ("op", "function", "error"),
    [
        ("ex2.approx.f32", np.exp2, 2**-22), ("ex2.approx.ftz.f32", np.exp2, 2**-22),
        ("lg2.approx.f32", np.log2, 2**-22), ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 2**-22),
        ("rcp.approx.ftz.f32", lambda x: 1 / x, 2**-22), ("sqrt.approx.f32", np.sqrt, 2**-22),
        ("sin.approx.f32", np.sin, 2**-20), ("cos.approx.f32", np.cos, 2**-20),
        ("tanh.approx.f32", np.tanh, 2**-10),
    ],
)  # fmt: skip
def test_approximate_functions(evaluate, op, function, error):
    x = np.linspace(0.01, 3.0, 300).astype(np.float32)
    got = evaluate(f"{op} %d, %a0;", [x], "f4")
    np.testing.assert_allclose(got, function(x.astype(np.float64)), rtol=error, atol=error)


def test_exponential_of_minus_infinity_is_zero(evaluate):
    assert (
        evaluate("ex2.approx.ftz.f32 %d, %a0;", [np.full(32, -np.inf, np.float32)], "f4").tolist()
        == [0.0] * 32
    )


def test_testp(evaluate):
    a = np.array(SPECIAL, np.float32)
    answers = {
        "finite": np.isfinite(a), "infinite": np.isinf(a), "number": ~np.isnan(a), "notanumber": np.isnan(a),
        "subnormal": (np.abs(a) < 2.0**-126) & (a != 0),
    }  # fmt: skip
    for what, expected in answers.items():
        got = evaluate(f"testp.{what}.f32 %p1, %a0;\nselp.b32 %d, 1, 0, %p1;", [a], "u4")
        np.testing.assert_array_equal(got.astype(bool), expected, what)


def _torch_halves(kind: str, count: int) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    values = [torch.from_numpy(each).to(dtype) for each in _floats(count)]
    return values, [each.view(torch.int16).numpy().view(np.uint16) for each in values]


def _same_halves(got: np.ndarray, expected: torch.Tensor) -> None:
    """Equal bits, but for the payload of NaN."""
    values = torch.from_numpy(got.view(np.int16)).view(expected.dtype)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(values[~values.isnan()]), torch.signbit(expected[~expected.isnan()]))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_arithmetic(evaluate, kind):
    (a, b, c), bits = _torch_halves(kind, 3)
    exact = a.double() * b.double() + c.double()
    cases = {
        f"add.rn.{kind} %d, %a0, %a1;": a + b,
        f"sub.rn.{kind} %d, %a0, %a1;": a - b,
        f"mul.rn.{kind} %d, %a0, %a1;": a * b,
        f"max.{kind} %d, %a0, %a1;": torch.fmax(a, b),
        f"min.NaN.{kind} %d, %a0, %a1;": torch.minimum(a, b),
        f"neg.{kind} %d, %a0;": -a,
        f"abs.{kind} %d, %a0;": a.abs(),
        f"fma.rn.{kind} %d, %a0, %a1, %a2;": _round_half(exact, a.dtype),
        f"fma.rn.relu.{kind} %d, %a0, %a1, %a2;": _round_half(exact, a.dtype).relu(),
    }
    for body, expected in cases.items():
        count = body.count("%a")
        got = evaluate(body, bits[:count], "u2")
        torch.testing.assert_close(
            torch.from_numpy(got.view(np.int16)).view(a.dtype),
            expected,
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=body,
        )


def _round_half(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to a half in one rounding: the nearest of the neighbours of a first guess."""
    guess = exact.to(dtype)
    bits = guess.view(torch.int16)
    best = guess.clone()
    for step in (-1, 1):
        near = (bits + step).view(dtype)
        closer = (near.double() - exact).abs() < (best.double() - exact).abs()
        tie = ((near.double() - exact).abs() == (best.double() - exact).abs()) & (
            near.view(torch.int16) % 2 == 0
        )
        finite = near.isfinite() & best.isfinite() & exact.isfinite()
        best = torch.where(finite & (closer | tie), near, best)
    return best


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_halves_are_two_halves(evaluate, kind):
    _, bits = _torch_halves(kind, 3)
    packed = [each[: each.size // 2 * 2].view(np.uint32) for each in bits]
    for op, count in (("add.rn", 2), ("mul.rn", 2), ("fma.rn", 3), ("max", 2), ("neg", 1)):
        arguments = ", ".join(f"%a{i}" for i in range(count))
        both = evaluate(f"{op}.{kind}x2 %d, {arguments};", packed[:count], "u4").view(np.uint16)
        halves = [each.view(np.uint16)[:300] for each in packed[:count]]
        one = evaluate(f"{op}.{kind} %d, {arguments};", halves, "u2")
        np.testing.assert_array_equal(both[:300], one, op)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_set_gives_ones_of_its_type(evaluate, kind):
    (a, b), bits = _torch_halves(kind, 2)
    packed = [each[:374].view(np.uint32) for each in bits]
    got = evaluate(f"set.gt.{kind}x2.{kind}x2 %d, %a0, %a1;", packed, "u4").view(np.int16)
    assert torch.equal(torch.from_numpy(got).view(a.dtype), (a > b)[:374].to(a.dtype))
    x, y = _floats(2)
    assert evaluate("set.lt.u32.f32 %d, %a0, %a1;", [x, y], "i4").tolist() == (-(x < y).astype(int)).tolist()
    assert evaluate("set.lt.f32.f32 %d, %a0, %a1;", [x, y], "f4").tolist() == (x < y).astype(float).tolist()


def test_half_functions(evaluate):
    x = torch.linspace(-3, 3, 64, dtype=torch.float16)
    bits = x.view(torch.int16).numpy().view(np.uint16)
    got = torch.from_numpy(evaluate("ex2.approx.f16 %d, %a0;", [bits], "u2").view(np.int16)).view(
        torch.float16
    )
    torch.testing.assert_close(got, torch.exp2(x.double()).half(), rtol=2**-10, atol=0)
    got = torch.from_numpy(evaluate("tanh.approx.f16 %d, %a0;", [bits], "u2").view(np.int16)).view(
        torch.float16
    )
    torch.testing.assert_close(got, torch.tanh(x.double()).half(), rtol=2**-9, atol=0)
