"""What can run here, what can't and why, and that every built instruction set computes the same."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stream_r1_kernels import backends, info

EVERY_OP_OF_AN_INSTRUCTION_SET = """
import torch
from stream_r1_kernels import ChunkMask, RotaryGrid, chunk_attention, qk_norm_rotary

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    q, k, v = (torch.randn(2, 120, 3, 33).to(dtype).requires_grad_() for _ in range(3))
    x, weight = torch.randn(2, 12, 60).to(dtype).requires_grad_(), torch.randn(60, requires_grad=True)
    phases = RotaryGrid(20).phases(3, 2, 2, 3)
    results = []
    for backend in ("cpu", "reference"):
        out = chunk_attention(q, k, v, ChunkMask(5, 3, window_frames=6, sink_frames=1), backend=backend)
        rotated = qk_norm_rotary(x, x, weight, weight, *phases, num_heads=3, backend=backend)
        loss = out.float().square().sum() + rotated[0].float().pow(3).sum() + rotated[1].float().sum()
        results.append((out, *rotated, *torch.autograd.grad(loss, (q, k, v, x, weight))))
    for a, b in zip(*results):
        unit = torch.finfo(dtype).eps * max(1, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=4 * unit, atol=8 * unit)
print(torch.ops.stream_r1.cpu_isa())
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set_that_runs_here(isa: str) -> None:
    environment = {**os.environ, "STREAM_R1_ISA": isa}
    command = [sys.executable, "-c", EVERY_OP_OF_AN_INSTRUCTION_SET]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    best = torch.ops.stream_r1.cpu_isa()  # a wish for more than the machine has gives what it has
    order = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
    if isa == "amx" and best == "avx512_bf16":  # torch multiplies without tiles then
        best = "amx"
    assert done.stdout.strip() == min(isa, best, key=order.index)


def test_a_build_against_another_torch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "read_build_record", lambda: {"torch": "2.1.0", "isa": [], "left_out": {}})
    why = backends._load_extension()
    assert why is not None
    assert "built against torch 2.1.0" in why
    assert f"torch {torch.__version__} is running" in why


def test_info_says_what_is_built_and_what_is_left_out() -> None:
    report = info.describe()
    assert f"against torch {torch.__version__.split('+')[0]}" in report
    assert ("left out        cuda: " in report) != ("CUDA kernels    " in report)
    assert "backend cpu       yes" in report
    assert "backend triton    no: " in report


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        *(((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), True), ((12, 1), True), ((13, 0), True)),
        *(((7, 5), False), ((10, 3), False), ((11, 0), False)),
    ],
)
def test_which_gpus_the_default_architectures_cover(capability: tuple[int, int], runs: bool) -> None:
    assert backends.covers(["80", "90a", "100a", "120"], capability) == runs


@pytest.fixture
def with_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a build that has them, on a machine with a GPU."""
    monkeypatch.setattr(backends, "_UNAVAILABLE", {})
    monkeypatch.setitem(backends._OPS, "cuda", backends._OPS["cpu"])
    monkeypatch.setattr(backends, "_CUDA_ARCHS", ["80"])


def on_gpu(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.usefixtures("with_cuda_kernels")
def test_the_cuda_kernels_are_picked_for_what_they_take() -> None:
    half = on_gpu(1, 4, 2, 64, dtype=torch.bfloat16)
    wide = on_gpu(1, 4, 2, 256, dtype=torch.bfloat16)
    single = on_gpu(1, 4, 2, 64, dtype=torch.float32)
    assert backends.resolve("auto", "cached_chunk_attention", half) == "cuda"
    assert backends.resolve("auto", "cached_chunk_attention", single) == "reference"
    assert backends.resolve("auto", "cached_chunk_attention", wide) == "reference"
    assert backends.resolve("auto", "modulated_norm", single) == "cuda"
    with pytest.raises(
        TypeError, match=r"'cuda' expects dtype torch.bfloat16, torch.float16; got torch.float32"
    ):
        backends.resolve("cuda", "chunk_attention", single)
    with pytest.raises(ValueError, match="at most 128 channels; got 256"):
        backends.resolve("cuda", "chunk_attention", wide)
    with pytest.raises(RuntimeError, match="needs cuda tensors, got one on cpu"):
        backends.resolve("cuda", "modulated_norm", torch.randn(2))


@pytest.mark.usefixtures("with_cuda_kernels")
def test_a_gpu_that_the_kernels_were_not_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    x = on_gpu(2, 2, 2, dtype=torch.float32)
    assert backends.resolve("auto", "gated_add", x) == "reference"
    with pytest.raises(
        RuntimeError, match=r"compiled for 80, and an old GPU has compute capability 7.5: build with"
    ):
        backends.resolve("cuda", "gated_add", x)


def test_a_build_without_cuda_kernels_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"torch": torch.__version__, "isa": [], "left_out": {"cuda": "no nvcc"}}
    monkeypatch.setattr(backends, "read_build_record", lambda: record)
    assert backends._find_unavailable()["cuda"] == "the CUDA kernels were left out of this build: no nvcc"
