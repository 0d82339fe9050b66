import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from stream_r1_kernels import backends, gated_add, modulated_norm, rms_norm, rms_norm_silu

SIZES = [(2, 84, 3, 256), (1, 130, 1, 64), (3, 10, 5, 33), (1, 4, 4, 5), (2, 0, 2, 8), (0, 6, 2, 8)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]


def per_token(value: Tensor, tokens: int) -> Tensor:
    return value.repeat_interleave(tokens // value.shape[1], dim=1)


def norm_formula(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed * (1 + per_token(scale, x.shape[1])) + per_token(shift, x.shape[1])


def gated_formula(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + y * per_token(gate, x.shape[1])


def silu_formula(x: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    out = y / (1 + (-y).exp())
    return out if before is None else torch.cat([before, out], dim=1)


def modulation(batch: int, frames: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Three slices of one tensor, strided as in the model."""
    table = torch.randn(batch, frames, 6, width).to(dtype)
    return [table[:, :, i] for i in range(3)]


def with_grads(function, inputs: list[Tensor], grad_out: Tensor) -> list[Tensor]:
    leaves = [value.detach().requires_grad_() for value in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


def check_against_float64(op, formula, inputs: list[Tensor], backend: str) -> None:
    """Errors at most twice those of the reference in the same dtypes, plus a unit in the last place."""
    grad_out = torch.randn_like(formula(*inputs).float())
    exact = with_grads(formula, [value.double() for value in inputs], grad_out)
    ours = with_grads(lambda *args: op(*args, backend=backend), inputs, grad_out)
    plain = with_grads(lambda *args: op(*args, backend="reference"), inputs, grad_out)
    for got, same_maths, truth in zip(ours, plain, exact, strict=True):
        assert got.dtype == same_maths.dtype
        assert got.shape == truth.shape
        if truth.numel() == 0:
            continue
        ulp = torch.finfo(got.dtype).eps * truth.abs().max()
        assert (got - truth).abs().max() <= 2 * (same_maths - truth).abs().max() + ulp


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("dtype", "modulation_dtype"), DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "frames", "width"), SIZES)
def test_modulated_norm_and_its_gradients(batch, tokens, frames, width, dtype, modulation_dtype, backend):
    torch.manual_seed(0)
    x = (torch.randn(batch, tokens, width) * 3 + 1).to(dtype)
    shift, scale, _ = modulation(batch, frames, width, modulation_dtype)
    check_against_float64(modulated_norm, norm_formula, [x, shift, scale], backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("dtype", "gate_dtype"), DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "frames", "width"), SIZES)
def test_gated_add_and_its_gradients(batch, tokens, frames, width, dtype, gate_dtype, backend):
    torch.manual_seed(0)
    x, y = torch.randn(2, batch, tokens, width).to(dtype)
    gate = modulation(batch, frames, width, gate_dtype)[2]
    check_against_float64(gated_add, gated_formula, [x, y, gate], backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "leading", "width"), SIZES)
def test_rms_norm_silu_and_its_gradients(batch, tokens, leading, width, dtype, weight_dtype, backend):
    torch.manual_seed(0)
    x, before = (torch.randn(batch, rows, width).to(dtype) * 3 for rows in (tokens, leading))
    weight = torch.randn(width).to(weight_dtype)
    check_against_float64(rms_norm_silu, silu_formula, [x, weight, before], backend)
    check_against_float64(rms_norm_silu, silu_formula, [x, weight], backend)


def rms_formula(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "leading", "width"), SIZES)
def test_rms_norm_and_its_gradients(batch, tokens, leading, width, dtype, weight_dtype):
    torch.manual_seed(0)
    wide = torch.randn(batch, tokens, width + leading).to(dtype) * 3
    x, weight = wide[..., leading:], torch.randn(width).to(weight_dtype)
    check_against_float64(rms_norm, rms_formula, [x, weight], "reference")
    exact = rms_formula(x.double(), weight.double())
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        rms_norm(x, weight, backend="cpu").double(), exact, rtol=4e-7 + unit / 2, atol=unit * 1e-4
    )


def test_rms_norm_is_torchs_where_autograd_records():
    x, weight = torch.randn(1, 3, 8, requires_grad=True), torch.ones(8)
    assert rms_norm(x, weight).requires_grad
    with pytest.raises(ValueError, match=r"'cpu' has no backward of rms_norm: use it under torch.no_grad"):
        rms_norm(x, weight, backend="cpu")
    with torch.no_grad():
        assert backends.resolve("auto", "rms_norm", x) == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_silu_copies_what_was_before_and_keeps_what_is_not_finite_in_its_row(dtype):
    torch.manual_seed(0)
    before = torch.full((1, 3, 40), torch.nan, dtype=dtype)
    before[:, 1] = torch.randn(40).to(dtype)
    x = torch.randn(1, 20, 40).to(dtype)
    x[:, 7, 3] = torch.nan
    out = rms_norm_silu(x, torch.ones(40), before, backend="cpu")
    assert torch.equal(out[:, 1], before[:, 1])
    assert out.isnan().any(-1)[0].nonzero().flatten().tolist() == [0, 2, 10]


def test_silu_of_large_values_is_their_positive_part():
    x = torch.tensor([[[1.0, -1.0, 0.0, 1.0]]])
    out = rms_norm_silu(x, torch.full((4,), 1e30), backend="cpu")
    torch.testing.assert_close(out, (x / x.square().mean().sqrt()).clamp(min=0) * 1e30)


@pytest.mark.parametrize("branch", [torch.bfloat16, torch.float16])
def test_gated_add_keeps_a_float32_stream_beside_a_low_precision_branch(branch):
    torch.manual_seed(0)
    x, y, gate = torch.randn(2, 12, 40), torch.randn(2, 12, 40).to(branch), torch.randn(2, 3, 40)
    check_against_float64(gated_add, gated_formula, [x, y, gate], "cpu")
    assert gated_add(x, y, gate).dtype == torch.float32


def test_a_frame_is_modulated_by_its_own_values_alone():
    torch.manual_seed(0)
    x = torch.randn(1, 12, 16)
    shift, scale, gate = modulation(1, 3, 16, torch.float32)
    changed = [value.clone() for value in (shift, scale, gate)]
    for value in changed:
        value[:, 1] += 1
    middle = slice(4, 8)
    for before, after in (
        (modulated_norm(x, shift, scale), modulated_norm(x, *changed[:2])),
        (gated_add(x, x, gate), gated_add(x, x, changed[2])),
    ):
        differs = (before != after).any(-1)[0]
        assert differs[middle].all()
        assert differs.sum() == 4


def test_a_large_mean_costs_no_digits():
    torch.manual_seed(0)
    noise = torch.randn(1, 4, 512).double()
    x = (noise + 1000).float()
    zero = torch.zeros(1, 1, 512)
    truth = norm_formula(x.double(), zero.double(), zero.double())
    torch.testing.assert_close(
        modulated_norm(x, zero, zero, backend="cpu").double(), truth, rtol=0, atol=2e-4
    )


def test_a_constant_token_is_its_shift():
    shift, scale, _ = modulation(1, 2, 8, torch.float32)
    out = modulated_norm(torch.full((1, 4, 8), 7.0), shift, scale)
    torch.testing.assert_close(out, per_token(shift, 4))


def test_rms_norm_silu_of_zeros_is_zero():
    """As in an autoencoder's own norm, which divides by 1e-12 where the length is less."""
    x = torch.zeros(1, 4, 8)
    assert torch.equal(rms_norm_silu(x, torch.ones(8), eps=1e-24, backend="cpu"), x)


@pytest.mark.usefixtures("restored_threads")
def test_sums_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 600, 48)
    shift, scale, gate = modulation(1, 2, 48, torch.float32)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(
            with_grads(lambda *a: modulated_norm(*a, backend="cpu"), [x, shift, scale], torch.ones_like(x))
            + with_grads(lambda *a: gated_add(*a, backend="cpu"), [x, y, gate], torch.ones_like(x))
            + [rms_norm_silu(x, shift[0, 0], y, backend="cpu")]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


ROUNDING = """
import torch
from stream_r1_kernels import gated_add
torch.manual_seed(0)
values = torch.randn(1, 1, 4099) * 10 ** (torch.rand(1, 1, 4099) * 14 - 9)
values[..., :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 65519.9, 65520.0])
for dtype in (torch.bfloat16, torch.float16):
    one, zero = torch.ones(1, 1, 4099, dtype=dtype), torch.zeros(1, 1, 4099, dtype=dtype)
    rounded = gated_add(zero, one, values, backend="cpu")
    torch.testing.assert_close(rounded, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    widened = gated_add(torch.zeros(1, 1, 4099), rounded, torch.ones(1, 1, 4099), backend="cpu")
    torch.testing.assert_close(widened, rounded.float(), rtol=0, atol=0, equal_nan=True)
"""


@pytest.mark.parametrize(
    "isa", ["baseline", "avx512"]
)  # the best that the machine has, if it lacks the one named
def test_conversions_are_torchs_in_every_instruction_set(isa):
    subprocess.run([sys.executable, "-c", ROUNDING], env=os.environ | {"STREAM_R1_ISA": isa}, check=True)


def test_opcheck():
    x = torch.randn(2, 6, 8, requires_grad=True)
    shift, scale, gate = (value.detach().requires_grad_() for value in modulation(2, 3, 8, torch.float32))
    torch.library.opcheck(torch.ops.stream_r1.modulated_norm, (x, shift, scale, 1e-6))
    torch.library.opcheck(torch.ops.stream_r1.gated_add, (x, torch.randn(2, 6, 8, requires_grad=True), gate))
    before, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.stream_r1.rms_norm_silu, (x, weight, before, 1e-6))
    torch.library.opcheck(torch.ops.stream_r1.rms_norm_silu, (x, weight, None, 1e-6))
    torch.library.opcheck(torch.ops.stream_r1.rms_norm, (x.detach(), weight.detach(), 1e-6))
    statistics = torch.randn(2, 6)
    plain = [value.detach() for value in (x, x, scale)]
    torch.library.opcheck(torch.ops.stream_r1.modulated_norm_backward, (*plain, statistics, statistics))
    torch.library.opcheck(torch.ops.stream_r1.gated_add_backward, tuple(plain))


def test_compiles_as_one_graph_with_the_same_gradients():
    torch.manual_seed(0)

    def block(x, y, shift, scale, gate):
        y = modulated_norm(y, shift, scale, backend="cpu")
        y = rms_norm_silu(y[:, 3:], shift[0, 0], x[:, :3], backend="cpu")
        return gated_add(x, y, gate, backend="cpu")

    inputs = [torch.randn(2, 12, 32), torch.randn(2, 12, 32), *modulation(2, 3, 32, torch.float32)]
    grad_out = torch.randn(2, 12, 32)
    eager = with_grads(block, inputs, grad_out)
    compiled = with_grads(torch.compile(block, fullgraph=True), inputs, grad_out)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused():
    x = torch.randn(1, 4, 8, requires_grad=True)
    zero = torch.zeros(1, 1, 8)
    for out in (
        modulated_norm(x, zero, zero, backend="cpu"),
        gated_add(zero.expand(1, 4, 8), x, zero, backend="cpu"),
    ):
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):
            grad.sum().backward()


X, Y, GATE = torch.zeros(2, 12, 8), torch.zeros(2, 12, 8), torch.zeros(2, 3, 8)
WEIGHT = torch.ones(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: modulated_norm(X[0], GATE, GATE),
            ValueError,
            r"modulated_norm: x: expected shape \[B, T, D\]",
        ),
        (lambda: modulated_norm(X.int(), GATE, GATE), TypeError, "modulated_norm: x: expected float32"),
        (
            lambda: modulated_norm(X, torch.zeros(2, 5, 8), GATE),
            ValueError,
            "shift: .*divide 12 tokens, got 5",
        ),
        (
            lambda: modulated_norm(X, GATE, torch.zeros(2, 4, 8)),
            ValueError,
            r"scale: expected shape \[2, 3, 8\]",
        ),
        (lambda: modulated_norm(X, GATE.half(), GATE), TypeError, "shift: expected torch.float32"),
        (lambda: modulated_norm(X, GATE, GATE, eps=-1), ValueError, "eps: expected a number >= 0, got -1"),
        (lambda: modulated_norm(X, GATE, GATE, backend="fast"), ValueError, "backend"),
        (lambda: gated_add(X, Y[:, :6], GATE), ValueError, r"gated_add: y: expected shape \[2, 12, 8\]"),
        (lambda: gated_add(X.half(), Y, GATE), TypeError, "gated_add: y: expected torch.float16"),
        (
            lambda: gated_add(X, Y, GATE[..., :4]),
            ValueError,
            r"gate: expected shape \[2, F, 8\], got \[2, 3, 4\]",
        ),
        (lambda: gated_add(X, Y, GATE.double()), TypeError, "gate: expected torch.float32"),
        (lambda: rms_norm(X[0], WEIGHT), ValueError, r"rms_norm: x: expected shape \[B, T, D\]"),
        (lambda: rms_norm(X, WEIGHT[:5]), ValueError, r"rms_norm: weight: expected shape \[8\], got \[5\]"),
        (
            lambda: torch.ops.stream_r1.rms_norm(X, WEIGHT[:5], 1e-6),
            ValueError,
            r"rms_norm: weight: expected shape \[8\]",
        ),
        (
            lambda: rms_norm_silu(X[0], WEIGHT),
            ValueError,
            r"rms_norm_silu: x: expected shape \[B, T, D\]",
        ),
        (lambda: rms_norm_silu(X, WEIGHT[:5]), ValueError, r"weight: expected shape \[8\], got \[5\]"),
        (lambda: rms_norm_silu(X, WEIGHT.int()), TypeError, "weight: expected a floating-point dtype"),
        (
            lambda: rms_norm_silu(X, WEIGHT, Y[:1]),
            ValueError,
            r"before: expected shape \[2, P, 8\], got \[1, 12, 8\]",
        ),
        (lambda: rms_norm_silu(X, WEIGHT, Y.half()), TypeError, "before: expected torch.float32 as x"),
        (lambda: rms_norm_silu(X, WEIGHT, eps=-1), ValueError, "eps: expected a number >= 0, got -1"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()
