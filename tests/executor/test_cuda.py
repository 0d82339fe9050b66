"""CUDA kernels, compiled by nvcc on the spot, and the faults planted in them."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ptx_executor import Kernel, MemoryAccessError, Module, PtxError, RaceError
from ptx_executor.nvcc import NvccError, NvccNotFound, compile_ptx, find_nvcc

SEEDS = range(3)


@pytest.fixture(scope="module")
def module() -> Module:
    return Module.from_ptx(compile_ptx(Path(__file__).parent / "kernels.cu"))


@pytest.fixture(scope="module")
def get(module: Module) -> Callable[..., Kernel]:
    """`get(name, fault)`: an instance of a template by its mangled name."""
    return lambda name, fault=0: module[
        next(key for key in module if key.startswith(f"_Z{len(name)}{name}ILi{fault}E"))
    ]


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _nan(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def _add(kernel: Kernel, **options) -> bool:
    n = 1000
    a, b, c = _normal(n), _normal(n, seed=1), _nan(n)
    kernel.launch(4, 256, [a, b, c, n], **options)
    return torch.equal(c, a + b)


def _block_sum(kernel: Kernel, **options) -> bool:
    x, sums = _normal(1000), _nan(4)
    kernel.launch(4, 256, [x, sums, 1000], **options)
    expected = torch.stack([part.double().sum() for part in x.split(256)])
    return bool((sums.double() - expected).abs().max() < 1e-4)


def _transpose(kernel: Kernel, **options) -> bool:
    x, y = _normal(50, 70), _nan(70, 50)
    kernel.launch((3, 2), (32, 8), [x, y, 50, 70], **options)
    return torch.equal(y, x.T)


def _pipelined_reverse(kernel: Kernel, **options) -> bool:
    x, y = _normal(6, 1024).bfloat16(), _nan(6, 1024, dtype=torch.bfloat16)
    kernel.launch(1, 128, [x, y, x.numel()], **options)
    return torch.equal(y, x.flip(1))


def _matmul(kernel: Kernel, **options) -> bool:
    m, n, k = 100, 70, 96
    a, b, c = _normal(m, k).bfloat16(), _normal(n, k, seed=1).bfloat16(), _nan(m, n)
    kernel.launch((2, 2), 128, [a, b, c, m, n, k], **options)
    expected = a.double() @ b.double().T
    return bool((c.double() - expected).abs().max() < 1e-4)


def _attention(kernel: Kernel, **options) -> bool:
    length = 150
    q, k, v = (_normal(length, 32, seed=i).bfloat16() for i in range(3))
    o = _nan(length, 32)
    kernel.launch(3, 128, [q, k, v, o, length, 32**-0.5 * math.log2(math.e)], **options)
    scores = q.double() @ k.double().T * 32**-0.5
    scores.masked_fill_(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
    expected = scores.softmax(-1) @ v.double()
    # Probabilities are rounded to bfloat16, 8 bits, before they meet v.
    return bool(((o.double() - expected).abs() <= 2**-8 * (scores.softmax(-1) @ v.double().abs())).all())


CHECKS = {
    "add": _add, "block_sum": _block_sum, "transpose": _transpose, "pipelined_reverse": _pipelined_reverse,
    "matmul": _matmul, "attention": _attention,
}  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", list(CHECKS))
def test_kernels(get, name, seed):
    assert CHECKS[name](get(name), seed=seed)
    assert CHECKS[name](get(name), seed=seed, early_copies=True, wave_blocks=1)


# name, fault, how it shows: an error, or None for numbers that are wrong with every seed
FAULTS = [
    ("add", 1, MemoryAccessError),
    ("block_sum", 1, RaceError),
    ("transpose", 1, RaceError),
    ("transpose", 2, MemoryAccessError),
    ("pipelined_reverse", 1, RaceError),
    ("pipelined_reverse", 2, RaceError),
    ("pipelined_reverse", 3, RaceError),
    ("matmul", 1, None),
    ("matmul", 2, RaceError),
    ("attention", 1, None),
    ("attention", 2, None),
    ("attention", 3, RaceError),
    ("attention", 4, RaceError),
]


@pytest.mark.parametrize(("name", "fault", "error"), FAULTS)
def test_planted_faults_are_caught(get, name, fault, error):
    for seed in SEEDS:
        if error is None:
            assert not CHECKS[name](get(name, fault), seed=seed)
        else:
            with pytest.raises(error):
                CHECKS[name](get(name, fault), seed=seed)


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name, fault, error in FAULTS if error is RaceError]
)
def test_races_also_show_in_the_numbers_of_some_seed(get, name, fault):
    """Copies that land late hide an overwrite that comes too early, so they land early too."""
    run = CHECKS[name]
    late = [run(get(name, fault), seed=seed, detect_races=False) for seed in SEEDS]
    early = [run(get(name, fault), seed=seed, detect_races=False, early_copies=True) for seed in SEEDS]
    assert not all(late + early)


def test_misaligned_vectors_are_caught(get):
    x = _normal(1025).bfloat16()
    with pytest.raises(MemoryAccessError, match=r"cp\.async is not a multiple of 16"):
        get("pipelined_reverse").launch(1, 128, [x[1:], _nan(1024, dtype=torch.bfloat16), 1024])


def test_calls_local_memory_and_library_functions(module):
    n = 300
    x, y = _normal(n), _nan(n)
    module["assorted"].launch(3, 128, [x, y, n, 3])
    i = np.arange(n)
    value = x.numpy() + ((i + 3) % 8).astype(np.float32)
    wide = value.astype(np.float64)
    erf = torch.erf(torch.from_numpy(wide)).numpy()
    power = np.where(i % 4 == 0, 1.0, wide ** (i % 4))
    modulo = np.fmod(np.trunc((value * np.float32(1e6)).astype(np.float64)), 1234567)
    far = np.sin((value * np.float32(1e5)).astype(np.float64))
    cases = [power, 8 * wide, far, erf + np.tanh(wide), np.log(np.abs(wide) + 1) / 3, modulo]
    np.testing.assert_allclose(y.numpy(), np.choose(i % 6, cases), rtol=1e-5, atol=1e-6)
    assert module.variables["calls"].view(np.int32)[0] == n // 6


def test_every_instruction_of_every_kernel_is_implemented(module):
    for kernel in module.values():
        kernel.check()


def test_nvcc_says_what_is_wrong():
    with pytest.raises(NvccError, match="undefined"):
        compile_ptx("__global__ void k() { undefined(); }")


def test_nvcc_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("NVCC", str(tmp_path / "nvcc"))
    with pytest.raises(NvccNotFound, match="is not a file"):
        find_nvcc()
    (tmp_path / "nvcc").touch()
    assert find_nvcc() == tmp_path / "nvcc"
    monkeypatch.delenv("NVCC")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(NvccNotFound, match="nvidia-cuda-nvcc"):
        find_nvcc()
    wheel = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    assert find_nvcc() == wheel


def test_all_errors_are_ptx_errors():
    assert issubclass(RaceError, PtxError)
    assert issubclass(MemoryAccessError, PtxError)
