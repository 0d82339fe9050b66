"""The norms and gated_add: forward and backward, run on real tensors, against float64."""

from collections.abc import Callable

import exact
import pytest
import torch
from machine import Machine
from torch import Tensor

from stream_r1_kernels.norm.reference import (
    gated_add_reference,
    modulated_norm_reference,
    rms_norm_reference,
    rms_norm_silu_reference,
)

SHAPES = [
    (1, 1, 1, 1),  # one element
    (2, 2, 15, 33),  # odd in every way
    (2, 3, 12, 64),
    (1, 1, 150, 264),  # a frame in several stretches, channels in several blocks
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, dtype: torch.dtype | None
) -> list[Tensor]:
    leaves = [(x.to(dtype) if dtype else x).detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return list(torch.autograd.grad(out, leaves, upstream.to(out.dtype)))


def modulation(batch: int, frames: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slices of one tensor, as in the student."""
    six = torch.randn(batch, frames, 6, width).to(dtype)
    return six[:, :, 0], six[:, :, 4]


@pytest.mark.parametrize("float_modulation", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "frames", "tokens", "width"), SHAPES)
def test_modulated_norm(
    machine: Machine,
    batch: int,
    frames: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    float_modulation: bool,
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(batch, frames * tokens, 2 * width) * 3 + 1).to(dtype)[:, :, :width]
    shift, scale = modulation(batch, frames, width, torch.float32 if float_modulation else dtype)
    out, mean, rstd = machine.run("modulated_norm", x, shift, scale, 1e-6)
    true = modulated_norm_reference(x.double(), shift.double(), scale.double(), 1e-6)
    if width > 1:  # of one channel the norm is 0 / 0 but for eps
        exact.assert_close(out, true, modulated_norm_reference(x, shift, scale, 1e-6))
    upstream = torch.randn(x.shape).to(dtype)
    ours = machine.run("modulated_norm_backward", upstream, x, scale, mean, rstd)
    function = lambda *leaves: modulated_norm_reference(*leaves, 1e-6)  # noqa: E731
    if width > 1:
        for a, b, c in zip(
            ours,
            gradients(function, [x, shift, scale], upstream, torch.float64),
            gradients(function, [x, shift, scale], upstream, None),
            strict=True,
        ):
            exact.assert_close(a, b, c)


MIXED = [
    *((dtype, dtype) for dtype in DTYPES),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


@pytest.mark.parametrize("float_gate", [False, True])
@pytest.mark.parametrize(("x_dtype", "y_dtype"), MIXED)
@pytest.mark.parametrize(("batch", "frames", "tokens", "width"), SHAPES)
def test_gated_add(
    machine: Machine,
    batch: int,
    frames: int,
    tokens: int,
    width: int,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    float_gate: bool,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, frames * tokens, width).to(x_dtype)
    y = torch.randn(batch, frames * tokens, 3 * width).to(y_dtype)[:, :, width : 2 * width]
    gate = modulation(batch, frames, width, torch.float32 if float_gate else y_dtype)[0]
    out = machine.run("gated_add", x, y, gate)
    exact.assert_close(
        out, gated_add_reference(x.double(), y.double(), gate.double()), gated_add_reference(x, y, gate)
    )
    upstream = torch.randn(x.shape).to(x_dtype)
    ours = machine.run("gated_add_backward", upstream, y, gate)
    for a, b, c in zip(
        ours,
        gradients(gated_add_reference, [x, y, gate], upstream, torch.float64)[1:],
        gradients(gated_add_reference, [x, y, gate], upstream, None)[1:],
        strict=True,
    ):
        exact.assert_close(a, b, c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "processors"),
    [
        (25, 1536, 1),  # a row more than there are warps at once: two rows a warp, some with one
        (49, 264, 2),
        (110, 40, 1),  # more than four rows a warp would take: several rounds of blocks
        (9, 1800, 3),  # wider than what is held in registers; blocks with one row
    ],
)
def test_several_whole_rows_a_warp(
    machine: Machine, rows: int, width: int, processors: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(1, rows, width) + 1).to(dtype), torch.randn(1, rows, width).to(dtype)
    six = torch.randn(1, 1, 6, width)
    shift, scale, gate = six[:, :, 0], six[:, :, 4], six[:, :, 2]
    for seed in range(2):
        on = {"seed": seed, "processors": processors}
        out = machine.run("modulated_norm", x, shift, scale, 1e-6, **on)[0]
        true = modulated_norm_reference(x.double(), shift.double(), scale.double(), 1e-6)
        exact.assert_close(out, true, modulated_norm_reference(x, shift, scale, 1e-6))
        out = machine.run("gated_add", x, y, gate, **on)
        true = gated_add_reference(x.double(), y.double(), gate.double())
        exact.assert_close(out, true, gated_add_reference(x, y, gate))
        out = machine.run("rms_norm", x, gate[0, 0], 1e-6, **on)
        true = rms_norm_reference(x.double(), gate[0, 0].double(), 1e-6)
        exact.assert_close(out, true, rms_norm_reference(x, gate[0, 0], 1e-6))


def test_blocks_run_all_at_once(machine: Machine) -> None:
    """At the sizes of 1.3B: 4680 rows of 8 a block, where two or three blocks fit each of 132 processors."""
    three = ((3168, 396), (3169, 199), (4680, 293), (12672, 396), (12673, 397), (32760, 1024))
    two = ((2112, 264), (2113, 133), (4680, 195), (8448, 264), (8449, 265), (32760, 1024))
    cases = {"gated_add": three, "modulated_norm": three, "modulated_norm_fp8": two, "quantize_rows": three}
    for op, sizes in cases.items():
        for rows, blocks in sizes:
            x = torch.zeros(1, rows, 1)
            rest = {"gated_add": (x, x[:, :1]), "quantize_rows": (False,)}.get(op, (x[:, :1], x[:, :1], 1e-6))
            with machine.only_launching():
                machine.run(op, x, *rest, processors=132)
            assert machine.grids == [(blocks, 1, 1)], (op, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (7, 33), (5, 96), (3, 1536)])
def test_rms_norm(machine: Machine, tokens: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(2, tokens, 2 * width)).to(dtype)[:, :, :width]
    for weight in (1 + torch.randn(width), torch.randn(width).to(dtype)):
        out = machine.run("rms_norm", x, weight, 1e-6)
        true = rms_norm_reference(x.double(), weight.double(), 1e-6)
        exact.assert_close(out, true, rms_norm_reference(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "leading", "tokens", "width"),
    [
        (1, 1, 1, 1),
        (2, 3, 7, 33),  # odd in every way; a row of the past and one to norm in a warp
        (2, 0, 5, 96),  # Wan's narrowest: two rows a warp
        (1, 4, 9, 384),  # its widest: more than a pack a lane
        (2, 2, 20, 8),  # 32 rows a warp
    ],
)
def test_rms_norm_silu(
    machine: Machine,
    batch: int,
    leading: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(batch, tokens, 2 * width)).to(dtype)[:, :, :width]
    before = torch.randn(batch, leading, width).to(dtype)
    weight = (1 + torch.randn(width)).to(weight_dtype or dtype)
    for past in (before, None):
        out = machine.run("rms_norm_silu", x, weight, past, 1e-6)
        exact_past = None if past is None else past.double()
        true = rms_norm_silu_reference(x.double(), weight.double(), exact_past, 1e-6)
        exact.assert_close(out, true, rms_norm_silu_reference(x, weight, past, 1e-6))
        if past is not None:
            assert torch.equal(out[:, :leading], before)


def test_rms_norm_silu_keeps_what_is_not_finite_in_its_row(machine: Machine) -> None:
    x, before = torch.randn(1, 4, 16), torch.randn(1, 2, 16)
    x[0, 1, 3], x[0, 2], before[0, 0, 5] = float("nan"), 0.0, float("inf")
    out = machine.run("rms_norm_silu", x, torch.ones(16), before, 1e-24)
    assert torch.equal(out[:, :2], before)
    assert out[0, 3].isnan().all()
    assert torch.equal(out[0, 4], torch.zeros(16))
    assert out[0, [2, 5]].isfinite().all()


def test_no_tokens(machine: Machine) -> None:
    x, scale = torch.randn(2, 0, 8), torch.randn(2, 1, 8)
    out, mean, rstd = machine.run("modulated_norm", x, scale, scale, 1e-6)
    assert out.shape == x.shape
    _, grad_shift, grad_scale = machine.run("modulated_norm_backward", x, x, scale, mean, rstd)
    assert torch.equal(grad_shift, torch.zeros_like(scale))
    assert torch.equal(grad_scale, torch.zeros_like(scale))
    assert torch.equal(machine.run("gated_add_backward", x, x, scale)[1], torch.zeros_like(scale))
    before = torch.randn(2, 3, 8)
    assert torch.equal(machine.run("rms_norm_silu", x, scale[0, 0], before, 1e-6), before)
    assert machine.run("rms_norm_silu", x, scale[0, 0], None, 1e-6).shape == x.shape


def test_the_order_of_warps_does_not_matter(machine: Machine) -> None:
    torch.manual_seed(0)
    x, (shift, scale) = torch.randn(1, 150, 40).bfloat16(), modulation(1, 1, 40, torch.bfloat16)
    _, mean, rstd = machine.run("modulated_norm", x, shift, scale, 1e-6)
    calls = [("modulated_norm_backward", x, x, scale, mean, rstd), ("gated_add_backward", x, x, scale)]
    for call in calls:
        results = [machine.run(*call, seed=seed) for seed in range(3)]
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
