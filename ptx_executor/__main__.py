"""`python -m ptx_executor FILE.ptx ...`: kernels, what they are made of, and what can't be executed."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from .errors import PtxError, UnsupportedInstruction
from .kernel import Kernel
from .module import Module

_GROUPS = {
    "tensor cores": ("mma", "ldmatrix", "stmatrix"),
    "asynchronous copies": ("cp",),
    "memory": ("ld", "st", "atom", "red", "ldu"),
    "barriers and warps": ("bar", "barrier", "shfl", "vote", "redux", "match", "activemask"),
    "jumps": ("bra", "brx", "ret", "exit", "call"),
}


def describe(kernel: Kernel) -> Iterator[str]:
    """Lines about a kernel: parameters, memory, instructions by group and opcode, the first unsupported
    one.
    """
    parameters = ", ".join(f"{p.size}" for p in kernel.parameters)
    yield f"{kernel.name}"
    yield f"  parameters (bytes)   {parameters or 'none'}"
    yield f"  shared memory        {kernel.static_shared} bytes, static"
    yield f"  local memory         {kernel.local_bytes} bytes a thread"
    if kernel.function.required_block:
        yield f"  block                {kernel.function.required_block}"
    count = Counter(instruction.opcode for instruction in kernel.function.code)
    yield f"  instructions         {count.total()}, in {len(kernel.segments)} straight pieces"
    named = {opcode for opcodes in _GROUPS.values() for opcode in opcodes}
    groups = {**_GROUPS, "arithmetic and moves": tuple(sorted(set(count) - named))}
    for group, opcodes in groups.items():
        found = sorted(((count[opcode], opcode) for opcode in opcodes if count[opcode]), reverse=True)
        if found:
            listed = ", ".join(f"{opcode} {number}" for number, opcode in found)
            yield f"    {group:20} {sum(number for number, _ in found):6}  ({listed})"
    try:
        kernel.check()
    except UnsupportedInstruction as error:
        yield f"  can't be executed: {error}"


def main(arguments: Sequence[str] | None = None) -> int:
    """List the kernels of the files given; 1 if a file can't be read or an instruction can't be executed."""
    parser = argparse.ArgumentParser(prog="python -m ptx_executor", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE.ptx")
    status = 0
    for path in parser.parse_args(arguments).files:
        try:
            module = Module.from_file(path)
        except (OSError, PtxError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            status = 1
            continue
        print(f"{path}: version {module.program.version}, target {module.program.target}")
        for kernel in module.values():
            lines = list(describe(kernel))
            print("\n".join(lines))
            status |= any("can't be executed" in line for line in lines)
    return status


if __name__ == "__main__":
    sys.exit(main())
