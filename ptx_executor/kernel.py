"""A kernel of a module: its layout, its compiled segments, and the launch."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import Arguments, parameter_offsets
from .codegen import Layout, compile_segment
from .dtypes import BYTES
from .errors import LaunchError, PtxError
from .inlining import inline_calls
from .memory import GlobalMemory, round_up
from .program import (
    Address,
    Function,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Register,
    Symbol,
    Variable,
    Vector,
)
from .report import Report
from .segments import segments
from .wave import Wave

if TYPE_CHECKING:
    from .module import Module

_MAX_THREADS = 1024
_MAX_SHARED = 227 * 1024
_MAX_BLOCK = (1024, 1024, 64)
_MAX_GRID = (2**31 - 1, 65535, 65535)
_WAVE_BLOCKS = 64
_WAVE_BYTES = 1 << 26


class Kernel:
    """One `.entry` of a `Module`; compiled segment by segment as it is run."""

    def __init__(self, module: Module, function: Function) -> None:
        function = inline_calls(function, module.program)
        self._module, self.function, self.name = module, function, function.name
        if not function.code or function.code[-1].opcode not in ("ret", "exit"):
            last = function.code[-1].line if function.code else 0
            function.code.append(Instruction("ret", (), (), None, last, "ret"))
        self.segments = segments(function)
        self.registers = sorted(_registers(function.code), key=lambda register: register.name)
        addresses = dict(module.addresses)
        offsets = parameter_offsets(function.params)
        addresses |= {p.name: ("param", offset) for p, offset in zip(function.params, offsets, strict=False)}
        self.local_bytes = _place(
            [v for v in function.variables if v.space in ("local", "param")], "local", addresses
        )
        used = _symbols(function.code)
        shared = [
            v
            for v in (*module.program.variables, *function.variables)
            if v.space == "shared" and v.name in used
        ]
        self.static_shared = _place([v for v in shared if v.size is not None], "shared", addresses)
        dynamic = [v for v in shared if v.size is None]
        if dynamic:
            self.static_shared = round_up(self.static_shared, max(v.align for v in dynamic))
            addresses |= {v.name: ("shared", self.static_shared) for v in dynamic}
        self.layout = Layout(self.name, addresses, _unread(function.code))
        self.shared_cell = _shared_cell(function.code)
        self._compiled: dict[tuple[int, bool], Callable[..., None]] = {}
        self._lines: dict[str, list[int]] = {}
        self._text = {instruction.line: instruction.text for instruction in function.code}

    @property
    def parameters(self) -> list[Variable]:
        """The parameters: name, alignment and size in bytes."""
        return self.function.params

    def compiled(self, index: int, masked: bool) -> Callable[..., None]:
        """The Python of a segment, for all lanes or for those of a mask."""
        key = (index, masked)
        if key not in self._compiled:
            self._compiled[key], lines = compile_segment(self.segments[index], self.layout, masked)
            self._lines[self._compiled[key].__code__.co_filename] = lines
        return self._compiled[key]

    def check(self) -> None:
        """Compile everything.

        Raises:
            UnsupportedInstruction: for the first instruction that can't be executed, even if no launch would
                reach it.
        """
        for index in range(len(self.segments)):
            self.compiled(index, False)
            self.compiled(index, True)

    def where(self, index: int) -> str:
        """For messages: a segment by the lines of the PTX."""
        if index >= len(self.segments):
            return "its end"
        first = self.segments[index].first
        return f"the code from line {first.line} on ({first.text})"

    def _locate(self, error: PtxError) -> PtxError:
        """The same error with the kernel's name and the line of the PTX that it was raised at."""
        trace = error.__traceback__
        while trace is not None:
            lines = self._lines.get(trace.tb_frame.f_code.co_filename)
            if lines is not None:
                line = lines[trace.tb_lineno - 1]
                return type(error)(f"{self.name}, line {line}: {error}: {self._text.get(line, '')}")
            trace = trace.tb_next
        return type(error)(f"{self.name}: {error}")

    def launch(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        *,
        shared_bytes: int = 0,
        seed: int = 0,
        time_limit: float = 60.0,
        detect_races: bool = True,
        early_copies: bool = False,
        count_bank_conflicts: bool = False,
        wave_blocks: int | None = None,
    ) -> Report:
        """Run the kernel; arrays among the arguments are changed in place.

        Args:
            grid: blocks in x, y, z; missing ones are 1.
            block: threads of a block in x, y, z.
            args: one for each parameter: a numpy array or torch tensor on the CPU (its address; views and
                strides are allowed), a `Pointer` into one, `None` (a null pointer), a number, `bytes`, or a
                tuple of these for a struct with C's alignment. Python's own numbers take the size of their
                parameter, inside a struct 4 bytes.
            shared_bytes: dynamic shared memory of a block.
            seed: of the order of blocks, warps and atomics. The same seed gives the same result.
            time_limit: seconds.
            detect_races: whether two warps that touch the same shared memory, one of them writing, with
                nothing that orders them, are an error.
            early_copies: let the data of `cp.async` land at a random time before its wait too; by default it
                comes as late as it may.
            count_bank_conflicts: count them for the report; slow.
            wave_blocks: blocks that run at the same time.

        Returns:
            What the launch did, counted.

        Raises:
            LaunchError: if grid, block, arguments or shared memory do not fit.
            UnsupportedInstruction: for an instruction that is not implemented.
            MemoryAccessError: for an access out of bounds or not aligned.
            RaceError: for a race in shared memory.
            BarrierError: for a deadlock or a barrier that only a part of its threads reach.
            DeviceAssertion: for a trap or a failed assertion of the kernel.
            ExecutionTimeout: after `time_limit` seconds.
        """
        grid3, block3 = _three("grid", grid, _MAX_GRID), _three("block", block, _MAX_BLOCK)
        for name, number, least in (("seed", seed, 0), ("shared_bytes", shared_bytes, 0)):
            if not isinstance(number, int | np.integer) or number < least:
                raise LaunchError(f"{name}: expected an integer from {least} on, got {number!r}")
        if wave_blocks is not None and wave_blocks < 1:
            raise LaunchError(f"wave_blocks: expected an integer from 1 on, got {wave_blocks}")
        self._check_launch(grid3, block3, shared_bytes)
        started = time.perf_counter()
        module = self._module
        arguments = Arguments(list(args), self.function.params, module.memory_end)
        memory = GlobalMemory(module.regions + arguments.regions)
        module.copy_in(memory.bytes)
        arguments.copy_in(memory.bytes)
        rng, report = np.random.default_rng(seed), Report(shared_bytes=self.static_shared + shared_bytes)
        blocks = rng.permutation(grid3[0] * grid3[1] * grid3[2])
        size = wave_blocks or self._wave_blocks(block3, shared_bytes, detect_races)
        try:
            with np.errstate(all="ignore"):
                for at in range(0, blocks.size, size):
                    Wave(
                        self,
                        blocks[at : at + size],
                        grid3,
                        block3,
                        arguments.bytes,
                        memory,
                        shared_bytes,
                        rng,
                        report,
                        deadline=started + time_limit,
                        detect_races=detect_races,
                        early_copies=early_copies,
                        count_conflicts=count_bank_conflicts,
                    ).run()
        except PtxError as error:
            raise self._locate(error) from None
        module.copy_out(memory.bytes)
        arguments.copy_out(memory.bytes)
        report.seconds = time.perf_counter() - started
        return report

    def _check_launch(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int
    ) -> None:
        threads = block[0] * block[1] * block[2]
        if threads > _MAX_THREADS:
            raise LaunchError(f"{self.name}: block {block} has {threads} threads, more than {_MAX_THREADS}")
        required, most = self.function.required_block, self.function.max_block
        if required is not None and block != required:
            raise LaunchError(f"{self.name}: expected block {required}, got {block}")
        if most is not None and threads > most[0] * most[1] * most[2]:
            raise LaunchError(f"{self.name}: expected a block of at most {most}, got {block}")
        if not 0 <= shared_bytes <= _MAX_SHARED - self.static_shared:
            raise LaunchError(
                f"{self.name}: shared_bytes {shared_bytes} and {self.static_shared} static ones; "
                f"expected at most {_MAX_SHARED} in all"
            )

    def _wave_blocks(self, block: tuple[int, int, int], shared_bytes: int, detect_races: bool) -> int:
        threads = round_up(block[0] * block[1] * block[2], 32)
        shared = self.static_shared + shared_bytes
        bytes_ = (
            threads * (self.local_bytes + sum(BYTES[register.type] for register in self.registers)) + shared
        )
        if detect_races:
            # Reads and writes of every warp, 8 bytes each, for every cell.
            bytes_ += shared // self.shared_cell[0] * threads // 32 * 16
        return max(1, min(_WAVE_BLOCKS, _WAVE_BYTES // max(bytes_, 1)))


def _three(name: str, size: int | Sequence[int], most: tuple[int, int, int]) -> tuple[int, int, int]:
    given = tuple(size) if isinstance(size, Iterable) and not isinstance(size, str) else (size,)
    try:
        x, y, z = (*map(operator.index, given), *(1,) * (3 - len(given)))
    except (TypeError, ValueError):
        x = y = z = 0
    if min(x, y, z) < 1:
        raise LaunchError(f"{name}: expected one to three positive numbers, got {size!r}")
    if any(each > limit for each, limit in zip((x, y, z), most, strict=True)):
        raise LaunchError(f"{name}: expected at most {most}, got {(x, y, z)}")
    return x, y, z


def _place(variables: list[Variable], space: str, addresses: dict[str, tuple[str, int]]) -> int:
    end = 0
    for variable in variables:
        end = round_up(end, variable.align)
        addresses[variable.name] = (space, end)
        assert variable.size is not None
        end += variable.size
    return end


def _leaves(operand: Operand) -> Iterator[Operand]:
    if isinstance(operand, Vector):
        for item in operand.items:
            yield from _leaves(item)
    elif isinstance(operand, Address):
        yield operand.base
    elif isinstance(operand, Negated):
        yield operand.register
    else:
        yield operand


def _registers(code: list[Instruction]) -> set[Register]:
    found = {
        leaf
        for i in code
        for operand in i.operands
        for leaf in _leaves(operand)
        if isinstance(leaf, Register)
    }
    found |= {instruction.guard[0] for instruction in code if instruction.guard}
    return found | {Register("%carry", "pred")}


def _symbols(code: list[Instruction]) -> set[str]:
    return {
        leaf.name
        for i in code
        for operand in i.operands
        for leaf in _leaves(operand)
        if isinstance(leaf, Symbol)
    }


def _unread(code: list[Instruction]) -> set[Register]:
    """Registers that only ever stand as the result of an atomic: it need not return anything."""
    results: set[Register] = set()
    read: set[Register] = set()
    for instruction in code:
        for at, operand in enumerate(instruction.operands):
            leaves = {leaf for leaf in _leaves(operand) if isinstance(leaf, Register)}
            (results if at == 0 and instruction.opcode == "atom" else read).update(leaves)
        if instruction.guard:
            read.add(instruction.guard[0])
    return results - read


def _shared_cell(code: list[Instruction]) -> tuple[int, bool]:
    """Bytes of the narrowest access that may reach shared memory; whether there are atomics among them."""
    sizes, atomics = [16], False
    for instruction in code:
        op, mods = instruction.opcode, instruction.mods
        spaces = {mod.split("::")[0] for mod in mods} & {"global", "shared", "local", "const", "param"}
        if op in ("ld", "st", "atom", "red") and (not spaces or "shared" in spaces):
            count = next((int(mod[1]) for mod in mods if mod in ("v2", "v4", "v8")), 1)
            sizes.append(BYTES.get(mods[-1], 1) * count)
            atomics |= op in ("atom", "red")
        elif op == "cp" and "shared" in spaces and len(instruction.operands) > 2:
            size = instruction.operands[2]
            sizes.append(size.value if isinstance(size, Immediate) else 4)
    return min(sizes), atomics
