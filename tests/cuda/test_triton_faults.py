"""Proof that the tests of Triton's attention can fail: faults are planted in its source, each must be caught.

As in test_planted_faults.py; docs/planted-faults.md lists them. Blocks are smaller than in `CONFIGS`, so that
small tensors have several.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attention_inputs import masked_attention
from triton_machine import TritonMachine

from ptx_executor import PtxError
from stream_r1_kernels import ChunkMask
from stream_r1_kernels.attention import triton_attention, triton_kernels

SOURCE = Path(triton_kernels.__file__)
PAGE = Path(__file__).parents[2] / "docs/planted-faults.md"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("forward", "grad_queries", "grad_keys"):
        small = {8: triton_attention.Config(32, 32, 2, 2)}
        monkeypatch.setitem(triton_attention.CONFIGS, (name, 64), small)


def cached(machine: TritonMachine, module: ModuleType, seed: int) -> None:
    """Two samples, a past, and scores that grow: the running maximum moves."""
    torch.manual_seed(seed)
    q, k, v, past_k, past_v = (torch.randn(2, n, 3, 64).bfloat16() for n in (40, 50, 50, 70, 70))
    k *= torch.linspace(0.2, 4, 50)[:, None, None]
    leaves, up, up_lse = [q, k, v], torch.randn(2, 40, 3, 64).bfloat16(), torch.randn(2, 3, 40)
    exact = [x.double().requires_grad_() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    with machine.running(module, seed=seed):
        ours = triton_attention.cached_chunk_attention(*leaves, past_k, past_v, 0.2)
        grads = torch.autograd.grad(ours, leaves, (up, up_lse))
    keys, values = torch.cat((past_k.double(), exact[1]), 1), torch.cat((past_v.double(), exact[2]), 1)
    true = masked_attention(exact[0], keys, values, 0.2)
    torch.testing.assert_close(ours[1].double(), true[1], rtol=1e-5, atol=1e-5)
    _assert_near([ours[0], *grads], [true[0], *torch.autograd.grad(true, exact, (up.double(), up_lse))])


def chunked(machine: TritonMachine, module: ModuleType, seed: int) -> None:
    torch.manual_seed(seed)
    mask = ChunkMask(20, 2, window_frames=3, sink_frames=1, first_chunk_frames=1, teacher_forcing=True)
    leaves = [torch.randn(1, 2 * 6 * 20, 1, 64).bfloat16().requires_grad_() for _ in range(3)]
    up = torch.randn(1, 2 * 6 * 20, 1, 64).bfloat16()
    with machine.running(module, seed=seed):
        out = triton_attention.chunk_attention(*leaves, mask.table(240), 0.125)
        grads = torch.autograd.grad(out, leaves, up)
    visible = mask.visible(240)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    true = masked_attention(*exact, 0.125, visible)[0]
    _assert_near([out, *grads], [true, *torch.autograd.grad(true, exact, up.double())])


def _assert_near(ours: list[torch.Tensor], true: list[torch.Tensor]) -> None:
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=0.01 * b.abs().max().item())


Probe = Callable[[TritonMachine, ModuleType, int], None]


# Of each probe: what is planted, in place of what.
FAULTS: dict[Probe, dict[str, tuple[str, str]]] = {
    cached: {
        "one key too many in a range's last tile": (
            "tl.arange(0, BLOCK) < last",
            "tl.arange(0, BLOCK) <= last",
        ),
        "the weighted sum of values not scaled down": (
            "values_here, sums * shrink[:, None]",
            "values_here, sums",
        ),
        "the sum of the weights not scaled down": ("total * shrink +", "total +"),
        "a log-sum-exp in powers of two": ("+ tl.log2(total)) * _LN_2", "+ tl.log2(total))"),
        "the past read from the fresh keys": ("_either(in_past, past_k, k)", "k"),
        "heads and samples mixed up": (
            "// heads, tl.program_id(1) % heads",
            "% heads, tl.program_id(1) // heads",
        ),
        "the log-sum-exp's gradient left out": ("of_row -= tl.load(", "of_row -= 0 * tl.load("),
        "a gradient of keys without the scale": ("sums_k *= (scale * unit)", "sums_k *= (unit)"),
        "gradients of fresh keys written behind as many as the past has": (
            "grad_k.data + _offsets(begin,",
            "grad_k.data + _offsets(begin + past,",
        ),
    },
    chunked: {
        "one block a program whatever the table says": (
            "tl.load(row, mask=here, other=tl.program_id(0) * BLOCK)",
            "tl.program_id(0) * BLOCK",
        ),
        "the first range read again for the others": ("row += 2 * over", "row += 0 * over"),
        "tiles continue past the end of a range": ("at + BLOCK >= last", "at + BLOCK >= last + BLOCK"),
        "the end of the range before kept": ("tl.where(over, end, last)", "tl.where(last == 0, end, last)"),
        "the last range of a row not read": ("(tile < tiles)", "(tile < tiles - 1)"),
    },
}


def broken(old: str, new: str, folder: Path) -> ModuleType:
    """The kernels' module with the fault."""
    text = SOURCE.read_text()
    assert text.count(old) == 1, f"{text.count(old)} places {old!r}, expected one"
    path = folder / SOURCE.name
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(SOURCE.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("probe", FAULTS)
def test_probes_pass_without_a_fault(triton_machine: TritonMachine, probe: Probe) -> None:
    probe(triton_machine, triton_kernels, 0)


@pytest.mark.parametrize(
    ("probe", "fault"),
    [pytest.param(probe, fault, id=name) for probe in FAULTS for name, fault in FAULTS[probe].items()],
)
def test_planted_faults_are_caught(
    triton_machine: TritonMachine, probe: Probe, fault: tuple[str, str], tmp_path: Path
) -> None:
    module = broken(*fault, tmp_path)
    with pytest.raises((AssertionError, PtxError)):
        probe(triton_machine, module, 0)


def test_the_list_is_complete() -> None:
    names = [name for faults in FAULTS.values() for name in faults]
    assert [name for name in names if f"| {name} |" not in PAGE.read_text()] == []
