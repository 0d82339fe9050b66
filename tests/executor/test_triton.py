"""Triton kernels, compiled for cuda:80."""

import math

import pytest
import torch
from triton_kernels import compile_kernel

from ptx_executor import Kernel, MemoryAccessError, Module, RaceError


class Launcher:
    """A Triton kernel, with its own launch settings; Triton adds two scratch pointers to the arguments."""

    def __init__(self, ptx: str, shared: int, threads: int) -> None:
        self.ptx = ptx
        self.kernel: Kernel = next(iter(Module.from_ptx(ptx).values()))
        self.shared, self.threads = shared, threads

    def __call__(self, grid: tuple[int, ...], *args: object, **options: object) -> None:
        scratch = [None] * (len(self.kernel.parameters) - len(args))
        self.kernel.launch(grid, self.threads, [*args, *scratch], shared_bytes=self.shared, **options)


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, math.nan)


def _softmax(run: Launcher, seed: int) -> None:
    x, y = _normal(6, 400).half(), _nan(6, 400)
    run((6,), x, y, 400, seed=seed)
    torch.testing.assert_close(y.double(), x.double().softmax(1), rtol=1e-5, atol=1e-7)


def _matmul_bf16(run: Launcher, seed: int) -> None:
    m, n, k = 100, 80, 144
    a, b, c = _normal(m, k).bfloat16(), _normal(k, n, seed=1).bfloat16(), _nan(m, n)
    run((2, 2), a, b, c, m, n, k, seed=seed, early_copies=seed == 1)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=1e-4)


def _matmul_tf32(run: Launcher, seed: int) -> None:
    m, n, k = 40, 48, 96
    a, b, c = _normal(m, k), _normal(k, n, seed=1), _nan(m, n)
    run((2, 2), a, b, c, m, n, k, seed=seed)
    exact = a.double() @ b.double()
    assert ((c.double() - exact).abs() <= 2**-9 * (a.double().abs() @ b.double().abs())).all()
    # ... and it is tf32: with ten bits the result can't be that of float32
    assert ((c.double() - exact).abs() > 2**-18).any()


def _attention(run: Launcher, seed: int) -> None:
    length = 150
    q, k, v = (_normal(length, 32, seed=i).bfloat16() for i in range(3))
    o = _nan(length, 32)
    run((3,), q, k, v, o, length, 32**-0.5 * math.log2(math.e), seed=seed, early_copies=seed == 1)
    scores = q.double() @ k.double().T * 32**-0.5
    p = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    assert ((o.double() - p @ v.double()).abs() <= 2**-8 * (p @ v.double().abs())).all()


def _column_norms(run: Launcher, seed: int) -> None:
    x, sums = _normal(100, 80).half(), torch.zeros(80)
    run((4, 2), x, sums, 100, 80, seed=seed)
    torch.testing.assert_close(sums.double(), x.double().square().sum(0), rtol=1e-5, atol=1e-5)


CHECKS = {
    "softmax": _softmax, "matmul_bf16": _matmul_bf16, "matmul_tf32": _matmul_tf32, "attention": _attention,
    "column_norms": _column_norms,
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_kernels(name):
    run = Launcher(*compile_kernel(name))
    run.kernel.check()
    for seed in range(3):
        CHECKS[name](run, seed)


def test_a_missing_row_is_caught():
    m, n, k = 100, 80, 144
    a, b, c = _normal(m, k).bfloat16(), _normal(k, n).bfloat16(), _nan(m - 1, n)
    with pytest.raises(MemoryAccessError, match="past the end of argument 2"):
        Launcher(*compile_kernel("matmul_bf16"))((2, 2), a, b, c, m, n, k)


# Barriers of these kernels that order nothing: before the first access, and where every warp continues
# with its own part.
SPARE = {"matmul_bf16": {1}, "attention": {3}}


@pytest.mark.parametrize("name", SPARE)
def test_every_missing_barrier_is_caught(name):
    whole = Launcher(*compile_kernel(name))
    pieces = whole.ptx.split("bar.sync \t0;")
    length, m, n, k = 150, 100, 80, 144
    q, k_, v = (_normal(length, 32, seed=i).bfloat16() for i in range(3))
    a, b = _normal(m, k).bfloat16(), _normal(k, n).bfloat16()
    found = set()
    for missing in range(1, len(pieces)):
        broken = (
            "bar.sync \t0;".join(pieces[:missing])
            + "bar.warp.sync -1;"
            + "bar.sync \t0;".join(pieces[missing:])
        )
        run = Launcher(broken, whole.shared, whole.threads)
        try:
            if name == "attention":
                run((3,), q, k_, v, _nan(length, 32), length, 1.0)
            else:
                run((2, 2), a, b, _nan(m, n), m, n, k)
        except RaceError:
            found.add(missing)
    assert found == set(range(1, len(pieces))) - SPARE[name]
