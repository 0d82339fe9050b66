"""Run a few PTX instructions on arrays: one thread for each element."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ptx_executor import Kernel, Module

sys.path.insert(0, str(Path(__file__).parent))  # for the Triton kernels: importlib mode leaves it alone

BITS = {1: "8", 2: "16", 4: "32", 8: "64"}


def source(body: str, pointers: int, *, registers: str = "", parameters: str = "", top: str = "") -> str:
    """A module with one kernel `test`, `pointers` pointer parameters in %rd0, %rd1, ... and the thread in
    %tid.
    """
    params = [f".param .u64 p{i}" for i in range(pointers)] + ([parameters] if parameters else [])
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(pointers))
    return f"""
.version 8.7
.target sm_80
.address_size 64
{top}
.visible .entry test({", ".join(params)})
{{
.reg .pred %p<20>;
.reg .b16 %h<20>;
.reg .b32 %r<40>;
.reg .f32 %f<40>;
.reg .b64 %rd<40>;
.reg .f64 %fd<20>;
.reg .b32 %tid;
{registers}
{loads}
mov.u32 %tid, %tid.x;
{body}
ret;
}}
"""


@pytest.fixture(scope="session")
def kernel() -> Callable[..., Kernel]:
    """`kernel(body, pointers, ...)`: the kernel of `source`, loaded."""
    return lambda *args, **options: Module.from_ptx(source(*args, **options))["test"]


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., np.ndarray]:
    """`evaluate(body, inputs, dtype)`: a function of arrays.

    `body` reads its inputs from %a0, %a1, ... and leaves its result in %d; these are registers of the arrays'
    widths, floats for float32 and float64. All arrays have the same length, at most 1024. In a second run
    half of the lanes are switched off, and
    have to keep what they had: the masked code is not the unmasked code.
    """

    def run(body: str, inputs: Sequence[np.ndarray], dtype: object, extra: str = "") -> np.ndarray:
        arrays = [np.ascontiguousarray(each) for each in inputs]
        n = arrays[0].size
        size = np.dtype(dtype).itemsize
        declarations, loads = [extra], []
        for i, array in enumerate(arrays):
            width = array.itemsize
            declarations.append(f".reg .{_register(array.dtype)} %a{i};")
            loads.append(f"mad.wide.u32 %rd{i + 20}, %tid, {width}, %rd{i};")
            loads.append(f"ld.global.b{BITS[width]} %a{i}, [%rd{i + 20}];")
        out = len(arrays)
        declarations.append(f".reg .{_register(np.dtype(dtype))} %d;")
        store = f"mad.wide.u32 %rd39, %tid, {size}, %rd{out};\nst.global.b{BITS[size]} [%rd39], %d;"
        text = source(
            "\n".join(loads) + "\n" + body + "\n" + store, out + 1, registers="\n".join(declarations)
        )
        result = np.full(n, 0x55, np.uint8).repeat(size).view(dtype)
        Module.from_ptx(text)["test"].launch(1, n, [*arrays, result], wave_blocks=1)
        masked = _masked(text, body)
        again = np.full(n, 0x55, np.uint8).repeat(size).view(dtype)
        kept = again.copy()
        Module.from_ptx(masked)["test"].launch(1, n, [*arrays, again])
        odd = np.arange(n) % 2 == 1
        np.testing.assert_array_equal(
            again.view(np.uint8).reshape(n, -1)[odd], result.view(np.uint8).reshape(n, -1)[odd]
        )
        np.testing.assert_array_equal(
            again.view(np.uint8).reshape(n, -1)[~odd], kept.view(np.uint8).reshape(n, -1)[~odd]
        )
        return result

    return run


def _register(kind: np.dtype) -> str:
    if kind in (np.dtype("f4"), np.dtype("f8")):
        return "f" + BITS[kind.itemsize]
    return "b" + BITS[max(kind.itemsize, 2)]


def _masked(text: str, body: str) -> str:
    """The same kernel whose even threads jump over the body."""
    skip = "and.b32 %r39, %tid, 1;\nsetp.eq.u32 %p19, %r39, 0;\n@%p19 bra DONE;\n"
    return text.replace(body, skip + body).replace("ret;\n}", "DONE:\nret;\n}")
