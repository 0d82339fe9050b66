"""Backends chosen over many devices, as a pure function; and the table that `info` prints of it."""

import itertools

import pytest
import torch

from build_support.cuda import DEFAULT_ARCHS
from stream_r1.estimate.devices import DEVICES
from stream_r1_kernels import dispatch, info

ALL = frozenset(dispatch.OPS)
KERNELS = {"cpu": ALL, "cuda": ALL, "triton": frozenset(dispatch.ATTENTION_OPS)}
HALF, FULL, DOUBLE = torch.bfloat16, torch.float32, torch.float64
CACHED = dispatch.ATTENTION_OPS[0]
CAPABILITIES = [
    (6, 1),
    (7, 0),
    (7, 5),
    (8, 0),
    (8, 6),
    (8, 9),
    (9, 0),
    (10, 0),
    (10, 3),
    (12, 0),
    (12, 1),
    None,
]
GPUS = {"A100": (8, 0), "RTX 4090": (8, 9), "H100": (9, 0), "B200": (10, 0)}


def table(build: dispatch.Build) -> tuple[dict[str, dict[str, str]], list[str]]:
    """device -> column -> backend, and the lines below."""
    lines = info.auto_table(build)
    end = lines.index("")
    columns = list(info._SITUATIONS)
    rows = {line[:24].strip(): line[24:].split() for line in lines[1 : end - 1]}
    return {name: dict(zip(columns, cells, strict=True)) for name, cells in rows.items()}, lines[end + 1 :]


def test_the_default_build_covers_the_gpus_of_the_predictions() -> None:
    archs = DEFAULT_ARCHS.split(";")
    for device in DEVICES.values():
        assert dispatch.arch_problem(archs, device.capability) is None
        assert device.architecture.removeprefix("sm_") in archs


def test_the_table_of_a_build_with_everything() -> None:
    rows, reasons = table(dispatch.Build(KERNELS, ["80", "90a"]))
    assert set(rows["cpu"].values()) == {"cpu", "reference"}
    a100 = {"one piece": "cuda", "two pieces": "cuda", "strided": "cuda"}
    h100 = {"one piece": "sdpa", "two pieces": "triton", "strided": "triton"}
    common = {
        "with grad": "triton",
        "one piece, grad": "triton",
        "float32": "sdpa",
        "float64": "reference",
        "heads of 256": "sdpa",
    }
    assert rows["GPU 8.0"] == rows["GPU 8.9"] == a100 | common | {"other ops": "cuda"}
    # on a new GPU torch's attention is preferred whatever there is: float32 and wide heads, too
    assert rows["GPU 9.0"] == h100 | common | {"other ops": "cuda"}
    assert rows["GPU 12.0"] == h100 | common | {"other ops": "reference"}
    assert any(line.startswith("sdpa: torch's own dense attention is likely") for line in reasons)
    compiled = "can't be used: the kernels were compiled for 80, 90a, and this GPU has compute capability"
    assert any(line.startswith(f"not cuda (GPU 10.0): {compiled} 10.0") for line in reasons)
    assert "not triton (GPU 8.0, GPU 8.9): expects heads of at most 128 channels; got 256" in reasons


def test_the_table_of_a_build_without_kernels() -> None:
    missing = {"cuda": "left out: no nvcc", "triton": "not installed", "cpu": "not built"}
    rows, reasons = table(dispatch.Build({}, (), missing))
    for cells in rows.values():
        assert cells["other ops"] == cells["float64"] == "reference"
        assert {backend for name, backend in cells.items() if name not in ("other ops", "float64")} == {
            "sdpa"
        }
    every = ", ".join(name for name in rows if name != "cpu")
    assert f"not cuda ({every}): can't be used: left out: no nvcc" in reasons
    assert "not cpu (cpu): can't be used: not built" in reasons


@pytest.mark.parametrize("archs", [DEFAULT_ARCHS.split(";"), ["80"], ["90a"], ["100f"], []])
@pytest.mark.parametrize("missing", [{}, {"triton": "no"}, {"cuda": "no"}, {"cuda": "no", "triton": "no"}])
def test_over_many_devices(archs: list[str], missing: dict[str, str]) -> None:
    """Auto takes what can run, would rather have had what can't; torch's attention leads where it should."""
    build = dispatch.Build(KERNELS, archs, missing)
    seen = set()
    for op, capability, dtype, width, grad, pieces, dense in itertools.product(
        *(("gated_add", *dispatch.ATTENTION_OPS), CAPABILITIES, (HALF, torch.float16, FULL, DOUBLE)),
        *((64, 128, 256), (False, True), (1, 2), (False, True)),
    ):
        head_dim = width if op in dispatch.ATTENTION_OPS else None
        call = dispatch.Call(op, "cuda", dtype, head_dim, capability, grad, pieces, dense)
        choice = dispatch.choose(call, build)
        seen.add(choice.backend)
        assert dispatch.refusal(choice.backend, call, build) is None
        assert all(dispatch.refusal(backend, call, build) is not None for backend in choice.refused)
        assert choice.backend not in missing
        if choice.backend == "cuda" and capability is not None:
            assert dispatch.covers(archs, capability)
        if dtype == DOUBLE:
            assert choice.backend == "reference"
        on_new_gpu = capability is not None and capability >= (9, 0)
        if op == CACHED and on_new_gpu and not grad and pieces == 1 and dense and dtype != DOUBLE:
            assert choice.backend == "sdpa"
    assert seen >= {"sdpa", "reference"}


@pytest.mark.parametrize("name", GPUS)
def test_training_prefers_the_kernel_with_a_backward(name: str) -> None:
    call = dispatch.Call(CACHED, "cuda", HALF, 128, GPUS[name], needs_grad=True, pieces=2)
    build = dispatch.Build(KERNELS, DEFAULT_ARCHS.split(";"))
    assert dispatch.choose(call, build).backend == "triton"
    without = dispatch.Build(KERNELS, DEFAULT_ARCHS.split(";"), {"triton": "not installed"})
    assert dispatch.choose(call, without).backend == "sdpa"
