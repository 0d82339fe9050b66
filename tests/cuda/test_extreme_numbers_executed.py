"""The kernels for GPUs where numbers are not finite, large, tiny or few: as the references, or float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from every_op import OPS
from extremes import check_gradients_at_large_logits, kinds, run
from machine import Machine
from torch import Tensor
from triton_machine import TritonMachine

from stream_r1_kernels import cached_chunk_attention, dmd_loss, region_saliency
from stream_r1_kernels.attention import api

ATTENTION = ("chunk_attention", "cached_chunk_attention", "lse")
PAIRS = [(name, "cuda") for name in OPS if name not in ("rms_norm", "fused_linear", "fused_linear_gated")]
PAIRS += [(name, "triton") for name in ATTENTION]

Running = Callable[[str], "contextmanager[None]"]


@pytest.fixture(scope="module")
def triton_machine() -> TritonMachine:
    return TritonMachine()


@pytest.fixture
def running(
    machine: Machine, triton_machine: TritonMachine, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], contextmanager[None]]:
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
    upstream = 1e4 if OPS[name].trained else 1.0
    for place in [None, *range(len(OPS[name].draw(2, torch.float16)))]:
        inputs = OPS[name].draw(2, torch.float16)
        for i in range(len(inputs)):
            if place in (None, i):
                inputs[i] = (inputs[i].double() * size).clamp(-6e4, 6e4).to(inputs[i].dtype)
        exact = run(name, "reference", [x.double() for x in inputs], upstream)
        with running(backend):
            ours = run(name, backend, inputs, upstream)
        for part, (a, b) in enumerate(zip(ours, exact, strict=True)):
            reachable = b.abs() < 0.99 * torch.finfo(a.dtype).max
            assert a[reachable].isfinite().all(), (place, part, a, b)
            if part == 0:  # what is finite is right, not cut off
                scale = b[reachable].abs().max().item() if reachable.any() else 0.0
                error = (a.double() - b)[reachable].abs()
                assert (error <= 0.02 * scale + 1e-6).all(), (place, a, b)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_widths_of_one_and_two(running: Running, name: str, backend: str, width: int) -> None:
    dtype = torch.bfloat16 if name in ATTENTION else torch.float32
    inputs = OPS[name].draw(width, dtype)
    exact, same = run(name, "reference", [x.double() for x in inputs]), run(name, "reference", inputs)
    with running(backend):
        ours = run(name, backend, inputs)
    for a, b, c in zip(ours, exact, same, strict=True):
        unit = torch.finfo(dtype).eps
        allowed = 2 * (c - b).abs().max().item() + 16 * unit
        torch.testing.assert_close(a.double(), b, rtol=2 * unit, atol=allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gradients_at_large_logits_are_as_exact_as_torchs(
    running: Running, backend: str, size: float, dtype: torch.dtype
) -> None:
    with running(backend):
        check_gradients_at_large_logits(backend, size, dtype)


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
    q, v = torch.ones(1, 3, 1, 2).bfloat16(), torch.randn(1, 200, 1, 2).bfloat16()
    k = torch.cat([torch.full((1, 150, 1, 2), -math.inf), torch.zeros(1, 50, 1, 2)], 1).bfloat16()
    with running(backend), torch.no_grad():
        out, lse = cached_chunk_attention(q, k, v, None, return_lse=True, backend=backend)
        none, low = cached_chunk_attention(q, k[:, :150], v[:, :150], None, return_lse=True, backend=backend)
    mean = v[:, 150:].float().mean(1, keepdim=True).expand_as(out)
    torch.testing.assert_close(out.float(), mean, rtol=0.01, atol=0.01)
    torch.testing.assert_close(lse, torch.full((1, 1, 3), math.log(50)))
    assert (none == 0).all()
    assert (low == -math.inf).all()


def test_float16_gradients_of_a_loss_whose_direction_leaves_its_range(running: Running) -> None:
    torch.manual_seed(0)
    real = torch.randn(2, 2, 16, 16, 16).half()
    x, fake = real.clone(), real + torch.randn_like(real) / 2
    x[:, 0, 0, 0, 0] += 0.01  # the normaliser is 1e-6 of the distance to the critic
    weights = {"w_intra": torch.rand(2, 2, 1, 16, 16) * 1e3, "w_inter": torch.tensor([1e-3, 1e3])}

    def gradient(dtype: torch.dtype, backend: str, scale: float) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        loss = dmd_loss(leaf, fake.to(dtype), real.to(dtype), **weights, backend=backend)
        return [loss.detach().double(), torch.autograd.grad(scale * loss, leaf)[0].double()]

    for scale in (1e-3, 1e-8):
        exact = gradient(torch.float64, "reference", scale)
        with running("cuda"):
            got = gradient(torch.float16, "cuda", scale)
        torch.testing.assert_close(got[0], exact[0], rtol=1e-4, atol=0)
        reachable = exact[1].abs() < 6e4
        torch.testing.assert_close(got[1][reachable], exact[1][reachable], rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e25, 2e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_whose_squares_leave_the_range(running: Running, dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    grads = (torch.randn(1, 1, 5, 3, 4, 50) * size).to(dtype)
    grads[..., 3] = 0
    with running("cuda"):
        saliency = region_saliency(grads, (2, 1, 25), backend="cuda")
    exact = region_saliency(grads.double(), (2, 1, 25), backend="reference")
    torch.testing.assert_close((saliency / size).double(), exact / size, rtol=1e-5, atol=1e-5)
