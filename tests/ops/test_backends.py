"""What can run here, what can't and why, and that every built instruction set computes the same."""

import os
import subprocess
import sys

import pytest
import torch

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
    assert "left out        cuda: " in report
    assert "backend cpu       yes" in report
    assert "backend triton    no: " in report
