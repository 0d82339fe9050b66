"""What the compiler makes of the kernels, for every architecture: held to tests/cuda/compiled.tsv.

The table has, for every kernel, the registers of a thread (as a GPU allocates them, in eights) and the bytes
of static shared memory. A kernel that got better fails too: `python tests/cuda/test_compile_gate.py` writes
the table again, and the change is looked at in review.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import toolchain  # noqa: E402

from build_support import cuda  # noqa: E402
from stream_r1.estimate.devices import DEVICES, Device  # noqa: E402
from stream_r1.estimate.roofline import KernelSize  # noqa: E402

ARCHS = ("80", "90a", "100a", "120")
TABLE = Path(__file__).parent / "compiled.tsv"

# kernel's name -> instructions that its machine code must have
COPIES_AND_PRODUCTS = (
    "LDGSTS.E.BYPASS.128",
    "LDSM.16.M88.4",
    "LDSM.16.MT88.4",
    "HMMA.16816.F32",
    "STG.E.128",
)
WHOLE_PACKS = ("LDG.E.128", "STG.E.128")
LOADS_ONLY = ("LDG.E.128",)
REQUIRED = {
    r"attention_(bf16|fp16)_\d+": COPIES_AND_PRODUCTS,
    r"attention_combine_\w+": WHOLE_PACKS,
    r"norm_rotary(_grad_x)?_(fp32|bf16|fp16)": WHOLE_PACKS,
    r"norm_rotary_grad_weight_\w+": LOADS_ONLY,
    r"modulated_norm(_grad_x)?_(fp32|bf16|fp16)": WHOLE_PACKS,
    r"modulated_norm_grad_modulation_\w+": LOADS_ONLY,
    r"(modulated_norm_fp8|quantize_rows)_\w+": ("LDG.E.128", "STG.E.64"),
    r"gated_add_\w+": WHOLE_PACKS,
    r"rms_norm_(silu_)?\w+": WHOLE_PACKS,
    r"dmd_distances_\w+": LOADS_ONLY,
    r"dmd_(directions|gradient|scale)_\w+": WHOLE_PACKS,
    r"region_saliency_\w+": LOADS_ONLY,
    r"intra_weights_\w+": WHOLE_PACKS,
    r"renew_sink_\w+": WHOLE_PACKS,
    r"add_parts|dmd_sum_loss": (),  # small: a value a thread
}


def find_cuobjdump() -> Path:
    """Of the toolkit, the path, NVIDIA's wheels, or Triton's package."""
    packages = Path(sysconfig.get_paths()["purelib"])
    places = [
        toolchain.toolkit().nvcc.parent,
        *(Path(found).parent for found in [shutil.which("cuobjdump")] if found),
    ]
    places += [packages / "nvidia/cu13/bin", packages / "triton/backends/nvidia/bin"]
    for place in places:
        if (place / "cuobjdump").exists():
            return place / "cuobjdump"
    raise FileNotFoundError(
        "the gate reads machine code with cuobjdump and found none: "
        "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )


@cache
def resources(arch: str) -> dict[str, dict[str, int]]:
    """Registers (in eights), shared memory, stack and spills of every kernel, as ptxas says."""
    _, log = toolchain.compile_cubin(arch)
    kernels: dict[str, dict[str, int]] = {}
    for entry in log.split("Compiling entry function ")[1:]:
        name = entry.split("'")[1]
        numbers = {
            key: int(found[1]) if (found := re.search(pattern, entry)) else 0
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
                "stack": r"(\d+) bytes stack frame",
                "spill stores": r"(\d+) bytes spill stores",
                "spill loads": r"(\d+) bytes spill loads",
            }.items()
        }
        kernels[name] = numbers | {"registers": -(-numbers["registers"] // 8) * 8}
    return kernels


@cache
def machine_code(arch: str) -> dict[str, set[str]]:
    """The opcodes of every kernel, with their modifiers."""
    cubin, _ = toolchain.compile_cubin(arch)
    cuobjdump = find_cuobjdump()
    environment = toolchain.toolkit().environment
    environment["PATH"] = f"{cuobjdump.parent}:{environment['PATH']}"
    done = subprocess.run(
        [str(cuobjdump), "-sass", str(cubin)], env=environment, capture_output=True, text=True, check=True
    )
    kernels: dict[str, set[str]] = {}
    for function in done.stdout.split("Function : ")[1:]:
        name = function.split()[0]
        kernels[name] = set(
            re.findall(r"^\s*/\*[0-9a-f]{4,5}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]+)", function, re.MULTILINE)
        )
    return kernels


@cache
def stated_blocks() -> dict[str, tuple[int, int]]:
    """Threads of a block of every kernel, and how many blocks are to fit a processor, as its PTX says."""
    _, ptx = toolchain.build_host(Path(__file__).parent / "runtime.cpp")
    kernels = {}
    for name, head in re.findall(r"\.entry (\w+)\(([^{]*)", ptx):
        threads, blocks = re.search(r"\.maxntid (\d+)", head), re.search(r"\.minnctapersm (\d+)", head)
        assert threads is not None, name
        kernels[name] = int(threads[1]), 1 if blocks is None else int(blocks[1])
    return kernels


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """column -> kernel -> "registers shared"."""
    head, *rows = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#")]
    return {column: {row[0]: row[index] for row in rows} for index, column in enumerate(head) if index}


def write_table(path: Path, what: str, table: dict[str, dict[str, str]]) -> None:
    names = dict.fromkeys(name for column in table.values() for name in column)
    rows = [[name, *(column[name] for column in table.values())] for name in names]
    lines = [f"# {what}", *("\t".join(row) for row in [["kernel", *table], *rows])]
    path.write_text("\n".join(lines) + "\n")


def measured(arch: str) -> dict[str, str]:
    """kernel -> "registers shared"."""
    found = sorted(resources(arch).items())
    return {name: f"{numbers['registers']} {numbers['shared']}" for name, numbers in found}


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_shared_memory(arch: str) -> None:
    assert measured(arch) == read_table(TABLE)[f"sm_{arch}"]


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_is_spilled_and_nothing_local(arch: str) -> None:
    for name, numbers in resources(arch).items():
        assert (numbers["stack"], numbers["spill stores"], numbers["spill loads"]) == (0, 0, 0), name
    for name, opcodes in machine_code(arch).items():
        assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))], name


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_the_blocks_that_a_kernel_states_fit_a_processor(device: Device) -> None:
    """Grids of row kernels are made for so many (csrc/cuda/launch.cuh)."""
    stated = stated_blocks()
    assert stated["modulated_norm_fp8_bf16"] == (256, 2)
    compiled = read_table(TABLE)[device.architecture]
    assert stated.keys() == compiled.keys()
    for name, (threads, blocks) in stated.items():
        registers, shared = map(int, compiled[name].split())
        size = KernelSize(threads, registers, shared)
        assert size.resident_blocks(device) >= blocks, name


@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(arch: str) -> None:
    kernels = machine_code(arch)
    assert set(kernels) == set(resources(arch))
    for name, opcodes in kernels.items():
        (required,) = [needs for pattern, needs in REQUIRED.items() if re.fullmatch(pattern, name)]
        for opcode in required:
            assert any(found.startswith(opcode) for found in opcodes), (
                f"{name} has no {opcode}: {sorted(opcodes)}"
            )


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "80"])
def test_fp8_is_converted_by_the_instruction_for_it(arch: str) -> None:
    for name, opcodes in machine_code(arch).items():
        if "fp8" in name or name.startswith("quantize_rows"):
            assert any(opcode.startswith("F2FP.SATFINITE.E4M3") for opcode in opcodes), name


def test_no_float_atomics() -> None:
    """They would make sums depend on the order of blocks."""
    for path in cuda.ROOT.glob("csrc/cuda/*.cu*"):
        assert "atomic" not in path.read_text().replace("without atomics", ""), path.name


def test_default_architectures_are_these() -> None:
    assert cuda.DEFAULT_ARCHS.split(";") == list(ARCHS)


if __name__ == "__main__":
    what = "Registers of a thread, in eights, and bytes of static shared memory, by nvcc 13.0."
    write_table(TABLE, what, {f"sm_{arch}": measured(arch) for arch in ARCHS})
