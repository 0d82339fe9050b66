"""Linear layers fused with what follows them: against float64, on any layout, and who takes which call."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_r1_kernels import backends, fused_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layers(depth: int, widths: list[int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    weights = [(torch.randn(width, depth) / depth**0.5).to(dtype) for width in widths]
    return weights, [torch.randn(width).to(dtype) for width in widths]


def formula(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    gelu: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """The definition in float64."""
    y = torch.cat([torch.einsum("btk,nk->btn", x.double(), weight.double()) for weight in weights], -1)
    if biases:
        y = y + torch.cat(biases).double()
    if gelu:
        y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    if gate is not None:
        y = y * gate.double().repeat_interleave(x.shape[1] // gate.shape[1], dim=1)
    return y if residual is None else residual.double() + y


def assert_near(got: Tensor, truth: Tensor, depth: int) -> None:
    """Within the rounding of the result and of a float32 sum over the depth."""
    assert got.shape == truth.shape
    if got.numel():
        largest = truth.abs().max()
        error = (got.double() - truth).abs().max()
        assert error <= (torch.finfo(got.dtype).eps + 3e-8 * depth**0.5 + 3e-7) * largest


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "frames", "depth", "widths"),
    [
        (1, 84, 3, 320, [320, 320, 320]),
        (2, 12, 4, 33, [65, 16]),
        (1, 800, 2, 300, [70]),  # several blocks of rows and pieces of the depth
        (3, 5, 5, 1, [1]),
        (2, 0, 2, 8, [8]),
        (0, 6, 2, 8, [8]),
    ],
)
def test_layers_and_what_follows(batch, tokens, frames, depth, widths, dtype, backend):
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, depth).to(dtype)
    weights, biases = layers(depth, widths, dtype)
    residual = torch.randn(batch, tokens, sum(widths)).to(dtype)
    gate = torch.randn(batch, frames, 6, sum(widths))[:, :, 2]
    # The reference rounds after each step.
    steps = {"cpu": 1, "reference": 4}[backend]
    for follows in (
        {},
        {"gelu": True},
        {"residual": residual},
        {"residual": residual, "gate": gate},
        {"gelu": True, "residual": residual, "gate": gate.to(dtype)},
    ):
        got = fused_linear(x, weights, biases, **follows, backend=backend)
        assert got.dtype == dtype
        truth = formula(x, weights, biases, **follows)
        if backend == "cpu":
            assert_near(got, truth, depth)
        elif truth.numel():
            assert (got.double() - truth).abs().max() <= steps * torch.finfo(dtype).eps * (
                truth.abs().max() + depth**0.5
            )
    assert_near(fused_linear(x, weights, backend="cpu"), formula(x, weights, []), depth)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    depth=st.integers(1, 300),
    widths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    offset=st.integers(0, 3),
    gelu=st.booleans(),
    residual=st.booleans(),
    gate=st.booleans(),
)
def test_any_size_and_layout(dtype, batch, tokens, depth, widths, offset, gelu, residual, gate):
    x = torch.randn(batch, tokens + 1, depth + offset).to(dtype)[:, 1:, offset:]
    weights, biases = layers(depth + offset, widths, dtype)
    weights = [weight[:, offset:] for weight in weights]
    follows = {}
    if residual:
        follows["residual"] = torch.randn(batch, sum(widths), tokens).to(dtype).transpose(1, 2)
        if gate:
            follows["gate"] = torch.randn(tokens, batch, sum(widths)).transpose(0, 1)
    got = fused_linear(x, weights, biases, gelu=gelu, **follows, backend="cpu")
    assert_near(got, formula(x, weights, biases, gelu, **follows), depth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_stay_in_their_row(dtype):
    x = torch.randn(1, 9, 20).to(dtype)
    x[0, 3, 5], x[0, 6, 0] = float("nan"), float("inf")
    weights, biases = layers(20, [40], dtype)
    out = fused_linear(x, weights, biases, gelu=True, backend="cpu")
    assert out[0, 3].isnan().all()
    assert not out[0, 6].isfinite().all()
    assert out[0, [0, 1, 2, 4, 5, 7, 8]].isfinite().all()


def test_grad_is_the_references():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 10, dtype=torch.float64, requires_grad=True)
    weights, biases = layers(10, [4, 3], torch.float64)
    residual, gate = torch.randn(2, 6, 7).double(), torch.randn(2, 3, 7).double()
    leaves = [value.requires_grad_() for value in (*weights, *biases, residual, gate)]

    def run(x, *leaves):
        return fused_linear(x, leaves[:2], leaves[2:4], gelu=True, residual=leaves[4], gate=leaves[5])

    assert torch.autograd.gradcheck(run, (x, *leaves))
    single = torch.randn(1, 2, 3, requires_grad=True)
    weight = torch.randn(4, 3)
    assert fused_linear(single, [weight]).requires_grad
    assert backends.explain("fused_linear", single).refused["cpu"].startswith("has no backward")
    with pytest.raises(
        ValueError, match=r"'cpu' has no backward of fused_linear: use it under torch.no_grad"
    ):
        fused_linear(single, [weight], backend="cpu")
    with torch.no_grad():
        assert backends.resolve("auto", "fused_linear", single) == "cpu"
    assert backends.resolve("auto", "fused_linear", single.detach(), weight) == "cpu"


X, W, B = torch.randn(2, 6, 8), torch.randn(5, 8), torch.randn(5)
BAD_CALLS = [
    (ValueError, r"x: expected shape \[B, T, K > 0\], got \[6, 8\]", (X[0], [W], [B]), {}),
    (TypeError, "x: expected float32.*got torch.int64", (X.long(), [W], [B]), {}),
    (ValueError, r"weights: expected shape \[N, 8\], got \[8, 5\]", (X, [W.T], [B]), {}),
    (ValueError, "biases: expected none or 2.*got 1", (X, [W, W], [B]), {}),
    (ValueError, "biases: .*at least one weight, got 0", (X, [], []), {}),
    (ValueError, r"biases: expected shape \[5\], got \[4\]", (X, [W], [B[:4]]), {}),
    (TypeError, "weights: expected torch.float32 as x, got torch.float16", (X, [W.half()], [B]), {}),
    (TypeError, "biases: expected torch.float32 as x, got torch.float16", (X, [W], [B.half()]), {}),
    (ValueError, r"residual: expected shape \[2, 6, 5\]", (X, [W], [B]), {"residual": X}),
    (ValueError, "gate: expected None without a residual", (X, [W], [B]), {"gate": torch.ones(2, 3, 5)}),
    *(
        (error, message, (X, [W], [B]), {"residual": torch.ones(2, 6, 5), "gate": gate})
        for error, message, gate in (
            (ValueError, r"gate: expected shape \[2, F, 5\]", torch.ones(2, 3, 4)),
            (ValueError, "gate: expected frames that divide 6 tokens, got 4", torch.ones(2, 4, 5)),
            (TypeError, "gate: expected torch.float32 as x, or float32", torch.ones(2, 3, 5).half()),
        )
    ),
    (ValueError, "weights: expected device cpu as x, got meta", (X, [W.to("meta")], [B]), {}),
]


@pytest.mark.parametrize(("error", "message", "arguments", "follows"), BAD_CALLS)
def test_refusals_name_the_parameter(error, message, arguments, follows):
    with pytest.raises(error, match=f"fused_linear: {message}"):
        fused_linear(*arguments, **follows)


def test_the_op_refuses_what_would_read_past_an_end():
    op = torch.ops.stream_r1.fused_linear
    gate, residual = torch.ones(2, 4, 5), torch.ones(2, 6, 5)
    for arguments in (
        (X, [W[:, :7]], [B], False, None, None),
        (X, [W], [B[:4]], False, None, None),
        (X, [W], [B, B], False, None, None),
        (X, [W], [], False, residual[:1], None),
        (X, [W], [], False, residual, gate),
        (X, [W], [], False, None, gate[:, :3]),
    ):
        with pytest.raises(ValueError, match="fused_linear: "):
            op(*arguments)
    with pytest.raises(ValueError, match="fused_linear: weights"):
        op(X, [W.bfloat16()], [], False, None, None)


def test_opcheck_and_compile():
    op = torch.ops.stream_r1.fused_linear
    residual, gate = torch.randn(2, 6, 5), torch.randn(2, 3, 5)
    torch.library.opcheck(op, (X, [W], [B], True, residual, gate))
    torch.library.opcheck(op, (X.bfloat16(), [W.bfloat16()] * 2, [], False, None, None))
    with torch.no_grad():
        compiled = torch.compile(lambda x: fused_linear(2 * x, [W], [B], gelu=True), fullgraph=True)
        for x in (X, torch.cat([X, X], 1), torch.cat([X, X, X])):  # tokens that vary, then samples
            torch.testing.assert_close(compiled(x), fused_linear(2 * x, [W], [B], gelu=True))
