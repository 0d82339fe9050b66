"""The kernels for GPUs where numbers are not finite, large, tiny or few: as the references, or float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import extremes
import pytest
import torch
from every_op import OPS
from extremes import Running, kinds, run
from machine import Machine
from triton_machine import TritonMachine

from stream_r1_kernels.attention import api

ATTENTION = ("chunk_attention", "cached_chunk_attention", "lse")
PAIRS = [(name, "cuda") for name in OPS if name not in ("rms_norm", "fused_linear", "fused_linear_gated")]
PAIRS += [(name, "triton") for name in ATTENTION]


@pytest.fixture
def running(machine: Machine, triton_machine: TritonMachine, monkeypatch: pytest.MonkeyPatch) -> Running:
    """running(backend): within it "cuda" or "triton" takes the calls."""

    @contextmanager
    def run_on(backend: str) -> Iterator[None]:
        if backend == "cuda":
            with machine.taking_calls():
                yield
        else:
            with triton_machine.running(), monkeypatch.context() as patch:
                patch.setattr(api, "resolve", lambda backend, *call, **rest: backend)
                yield

    return run_on


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_what_is_not_finite_comes_out_as_from_the_reference(
    running: Running, name: str, backend: str, bad: float
) -> None:
    width, dtype = 3, torch.bfloat16 if name in ATTENTION else torch.float32
    for place in range(len(OPS[name].draw(width, dtype))):
        inputs = OPS[name].draw(width, dtype)
        inputs[place].view(-1)[-1] = bad
        expected = run(name, "reference", inputs)
        with running(backend):
            ours = run(name, backend, inputs)
        for part, (a, b) in enumerate(zip(ours, expected, strict=True)):
            if part == 0:
                assert torch.equal(kinds(a), kinds(b)), (place, a, b)
            else:  # of what has no gradient the order of a sum decides; a tile's rows share a NaN
                assert not (a.isfinite() & b.isnan()).any(), (place, part, a, b)
            finite = a.isfinite() & b.isfinite()
            close = (0.02, 0.02) if dtype == torch.bfloat16 else (1e-4, 1e-5)
            torch.testing.assert_close(a[finite], b[finite], rtol=close[0], atol=close[1])


@pytest.mark.parametrize("size", [1e-5, 3e4])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_float16_is_finite_wherever_the_true_value_is(
    running: Running, name: str, backend: str, size: float
) -> None:
    extremes.check_float16(name, backend, size, (1e4,), running)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_widths_of_one_and_two(running: Running, name: str, backend: str, width: int) -> None:
    dtype = torch.bfloat16 if name in ATTENTION else torch.float32
    extremes.check_width(name, backend, width, dtype, running)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gradients_at_large_logits_are_as_exact_as_torchs(
    running: Running, backend: str, size: float, dtype: torch.dtype
) -> None:
    with running(backend):
        extremes.check_gradients_at_large_logits(backend, size, dtype)


def test_parts_of_a_split_sum_at_large_logits(machine: Machine) -> None:
    """All scores are near 1e4; what the parts weigh must not be read off rounded log-sum-exps."""
    torch.manual_seed(0)
    q = torch.full((1, 4, 1, 64), 100.0).half()
    k = torch.full((1, 600, 1, 64), 12.5).half()
    k[:, :, :, 0] = torch.randint(-8, 8, (600,))[:, None] / 64
    v = (torch.randn(1, 600, 1, 64) + torch.arange(600)[:, None, None] // 300).half()
    out, lse = machine.run("cached_chunk_attention", q, k, v, None, None, 0.125, processors=8)
    assert len(machine.launches) == 2
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 0.125
    exact = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=3e-4)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_tile_of_infinitely_low_scores_counts_as_nothing(running: Running, backend: str) -> None:
    extremes.check_infinitely_low_scores(backend, 150, 50, torch.bfloat16, running)


def test_float16_gradients_of_a_loss_whose_direction_leaves_its_range(running: Running) -> None:
    extremes.check_direction_beyond_float16("cuda", 16, running)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e25, 2e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_whose_squares_leave_the_range(running: Running, dtype: torch.dtype, size: float) -> None:
    extremes.check_squares_beyond_range("cuda", size, dtype, running)
