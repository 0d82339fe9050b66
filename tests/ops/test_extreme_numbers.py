"""Every op where numbers are not finite, large, tiny or few: as its reference, or float64."""

import math
import os
import subprocess
import sys
from pathlib import Path

import extremes
import pytest
import torch
from every_op import OPS, PAIRS
from extremes import here, kinds, run
from torch.nn import functional

from stream_r1_kernels import fused_linear, rms_norm_silu


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_what_is_not_finite_comes_out_as_from_the_reference(name: str, backend: str, bad: float) -> None:
    width = 3
    for place in range(len(OPS[name].draw(width, torch.float32))):
        for at in (0, -1):
            inputs = OPS[name].draw(width, torch.float32)
            inputs[place].view(-1)[at] = bad
            expected, ours = run(name, "reference", inputs), run(name, backend, inputs)
            if math.isnan(bad):
                lets_through = name not in ("dmd_loss", "dmd_gradient_") or place > 2
                assert any(x.isnan().any() for x in expected) == lets_through
            for part, (a, b) in enumerate(zip(ours, expected, strict=True)):
                if part == 0 or math.isnan(bad):
                    assert torch.equal(kinds(a), kinds(b)), (place, at, part, a, b)
                elif backend == "cpu":  # of what has no gradient, inf - inf, the order of a sum decides
                    assert not (a.isfinite() & ~b.isfinite()).any(), (place, at, part, a, b)
                finite = a.isfinite() & b.isfinite()
                torch.testing.assert_close(a[finite], b[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-5, 1.0, 3e2, 3e4])
@pytest.mark.parametrize(("name", "backend"), [*PAIRS, *((name, "reference") for name in OPS)])
def test_float16_is_finite_wherever_the_true_value_is(name: str, backend: str, size: float) -> None:
    extremes.check_float16(name, backend, size, (1e-4, 1e4), here)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_widths_of_one_and_two(name: str, backend: str, dtype: torch.dtype, width: int) -> None:
    extremes.check_width(name, backend, width, dtype, here)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e2, 1e3, 1e4])
def test_gradients_at_large_logits_are_as_exact_as_torchs(size: float, dtype: torch.dtype) -> None:
    for backend in ("cpu", "reference"):
        extremes.check_gradients_at_large_logits(backend, size, dtype)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_gradients_at_large_logits_are_as_exact_in_every_instruction_set(isa: str) -> None:
    code = (
        "import torch, extremes\n"
        "for size in (1e2, 1e3, 1e4):\n"
        "    extremes.check_gradients_at_large_logits('cpu', size, torch.float32)\n"
    )
    path = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    environment = os.environ | {"STREAM_R1_ISA": isa, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_tile_of_infinitely_low_scores_counts_as_nothing(backend: str) -> None:
    extremes.check_infinitely_low_scores(backend, 400, 100, torch.float32, here)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float16_gradients_of_a_loss_whose_direction_leaves_its_range(backend: str) -> None:
    extremes.check_direction_beyond_float16(backend, 32, here)


def test_activations_vanish_at_large_negative_numbers() -> None:
    """As torch's do: -0 where the sigmoid underflows, NaN of -inf."""
    x = torch.tensor([-60.0, -100.0, -1e10, -3e38])
    ours = fused_linear(x[None, :, None], [torch.ones(1, 1)], gelu=True, backend="auto").flatten()
    torch.testing.assert_close(ours, functional.gelu(x, approximate="tanh"))
    with torch.no_grad():
        ours = fused_linear(x[None, :, None], [torch.ones(1, 1)], gelu=True, backend="cpu").flatten()
    torch.testing.assert_close(ours, functional.gelu(x, approximate="tanh"))
    row, weight = torch.ones(1, 1, 4), torch.cat([x[:3], torch.tensor([-math.inf])])
    torch.testing.assert_close(
        rms_norm_silu(row, weight, eps=0.0, backend="cpu")[0, 0], functional.silu(weight), equal_nan=True
    )


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e25, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_norms_whose_squares_leave_the_range(backend: str, dtype: torch.dtype, size: float) -> None:
    extremes.check_squares_beyond_range(backend, size, dtype, here)
