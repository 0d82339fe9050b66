"""What Triton makes of its attention kernels, for every generation of GPU: held to tests/cuda/triton.tsv.

Each kernel in each configuration of `triton_attention.CONFIGS`, for bfloat16 (float16 gave the same numbers):
the registers of a thread, in eights, and the bytes of shared memory. A kernel that got better fails too:
`python tests/cuda/test_triton_gate.py` writes the table again, and the change is looked at in review.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import toolchain  # noqa: E402
from test_compile_gate import find_cuobjdump, read_table, write_table  # noqa: E402
from triton_machine import compile_kernel, target  # noqa: E402

from stream_r1_kernels.attention import triton_attention, triton_kernels  # noqa: E402

GENERATIONS = (8, 9, 10)
TABLE = Path(__file__).parent / "triton.tsv"
KERNELS = sorted(triton_attention.CONFIGS)

# in the PTX: products on the generation's own tensor cores, and copies of 16 bytes that continue meanwhile
PRODUCTS = {8: "mma.sync.aligned.m16n8k16", 9: "wgmma.mma_async", 10: "tcgen05.mma"}
COPIES = r"cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 0x10"
# A block may have this much shared memory: on 8.6, 8.9 and 12.0; on 9.0; on 10.0.
SHARED = {8: 99 << 10, 9: 227 << 10, 10: 227 << 10}


@cache
def compiled(generation: int, name: str, head_dim: int) -> Any:
    x = torch.zeros(1, 16, 1, head_dim, dtype=torch.bfloat16)
    rows, of_rows = triton_kernels.Rows(x, 0, head_dim, head_dim), torch.zeros(16)
    table = torch.zeros(4, dtype=torch.int32)
    tensors = {
        "forward": (*[rows] * 6, of_rows),
        "grad_queries": (*[rows] * 6, of_rows, rows, of_rows, rows, of_rows, of_rows),
        "grad_keys": (*[rows] * 3, of_rows, rows, of_rows, of_rows, rows, rows),
    }[name]
    numbers = (1, 16, 16, 0, 1, 0.125)
    config = triton_attention.CONFIGS[name, head_dim][generation]
    with target(10 * generation):
        return compile_kernel(getattr(triton_kernels, name), config, (*tensors, table, *numbers), head_dim)


@cache
def resources(generation: int, name: str, head_dim: int) -> dict[str, int]:
    """Registers in eights, shared memory, and bytes of stack (spills are there too) and local memory."""
    kernel = compiled(generation, name, head_dim)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(find_cuobjdump()), "-res-usage", file.name]
        environment = toolchain.toolkit().environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    registers = -(-int(found["REG"]) // 8) * 8
    return {
        "registers": registers,
        "shared": kernel.metadata.shared,
        "stack": int(found["STACK"]),
        "local": int(found["LOCAL"]),
    }


def measured(generation: int) -> dict[str, str]:
    """kernel -> "registers shared"."""
    row = {}
    for name, head_dim in KERNELS:
        numbers = resources(generation, name, head_dim)
        row[f"{name}_{head_dim}"] = f"{numbers['registers']} {numbers['shared']}"
    return row


@pytest.mark.parametrize("generation", GENERATIONS)
def test_registers_and_shared_memory(generation: int) -> None:
    assert measured(generation) == read_table(TABLE)[f"sm_{generation}0"]
    assert max(resources(generation, *kernel)["shared"] for kernel in KERNELS) <= SHARED[generation]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_nothing_is_spilled_and_nothing_local(generation: int) -> None:
    for kernel in KERNELS:
        numbers = resources(generation, *kernel)
        assert (numbers["stack"], numbers["local"]) == (0, 0), kernel
        assert not re.search(r"\b(ld|st)\.local", compiled(generation, *kernel).asm["ptx"]), kernel


@pytest.mark.parametrize("generation", GENERATIONS)
def test_tensor_cores_and_copies(generation: int) -> None:
    for kernel in KERNELS:
        ptx = compiled(generation, *kernel).asm["ptx"]
        others = {product for other, product in PRODUCTS.items() if other != generation}
        assert PRODUCTS[generation] in ptx, kernel
        assert not [product for product in others if product in ptx], kernel
        assert re.search(COPIES, ptx), kernel
        assert "st.global.v4.b32" in ptx, kernel
        assert "atom." not in ptx, kernel  # they would make sums depend on the order of blocks


if __name__ == "__main__":
    what = "Registers of a thread, in eights, and bytes of shared memory, by Triton 3.7."
    write_table(TABLE, what, {f"sm_{generation}0": measured(generation) for generation in GENERATIONS})
