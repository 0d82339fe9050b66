"""Turn a segment of PTX into a Python function over numpy arrays.

The function takes the register views of one row of warps, the row and a mask of lanes. Each segment has two
forms: one for when all lanes take part, whose results are written straight into the registers, and one with a
mask.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import special
from .dtypes import BYTES, NUMPY, SIGNED, UNSIGNED, is_float, is_signed
from .errors import UnsupportedInstruction
from .memory import GLOBAL_BASE
from .program import Immediate, Instruction, Negated, Operand, Register, Special, Symbol, Vector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .segments import Segment


@dataclass
class Layout:
    """Where the variables of a kernel lie, and which views of registers its segments use.

    Attributes:
        addresses: name of a variable -> (space, address).
        views: (register, numpy type) -> index into the list of views that a compiled segment receives.
        unread: registers that no instruction reads.
    """

    name: str
    addresses: dict[str, tuple[str, int]]
    unread: set[Register]
    views: dict[tuple[Register, np.dtype[Any]], int] = field(default_factory=dict)

    def view(self, register: Register, kind: np.dtype[Any]) -> int:
        return self.views.setdefault((register, kind), len(self.views))


class Operation:
    """An instruction while it is compiled: its modifiers are taken one by one; what is left is an error."""

    def __init__(self, instruction: Instruction) -> None:
        self.instruction = instruction
        self.opcode = instruction.opcode
        self.operands = instruction.operands
        self._mods = list(instruction.mods)

    def flag(self, *names: str) -> bool:
        """Whether one of these modifiers is there."""
        found = [name for name in names if name in self._mods]
        for name in found:
            self._mods.remove(name)
        return bool(found)

    def choice(self, *names: str, default: str = "") -> str:
        """The one of these modifiers that is there."""
        for name in self._mods:
            if name in names:
                self._mods.remove(name)
                return name
        return default

    def kind(self) -> str:
        """The last modifier, which has to be a type."""
        if not self._mods or self._mods[-1] not in BYTES:
            raise self.unsupported("it ends in no known type")
        return self._mods.pop()

    def drop(self, *prefixes: str) -> None:
        """Ignore the modifiers that start so: hints about caches and scopes."""
        self._mods = [mod for mod in self._mods if not mod.startswith(prefixes)]

    def done(self) -> None:
        if self._mods:
            raise self.unsupported("unknown modifier ." + " .".join(self._mods))

    def unsupported(self, why: str) -> UnsupportedInstruction:
        line, text = self.instruction.line, self.instruction.text
        return UnsupportedInstruction(f"line {line}: {why}: {text}")


class Emitter:
    """Writes the Python of one segment."""

    def __init__(self, layout: Layout, masked: bool) -> None:
        self.layout = layout
        self.masked = masked
        self.mask: str | None = "m" if masked else None
        self.line = 0
        self._body: list[tuple[int, str]] = []  # (line of the PTX, Python)
        self._indent = 1
        self._used: dict[int, str] = {}
        self._constants: dict[tuple[str, int], str] = {}
        self._lanes: dict[str, str] = {}
        self._fragments: dict[tuple[str, tuple[Register, ...]], str] = {}
        self._names = 0
        self.namespace: dict[str, Any] = {}

    # Lines and names.

    def emit(self, text: str) -> None:
        self._body.append((self.line, "    " * self._indent + text))

    def name(self, prefix: str = "t") -> str:
        self._names += 1
        return f"{prefix}{self._names}"

    def let(self, expression: str, prefix: str = "t") -> str:
        """A new local variable for an expression."""
        name = self.name(prefix)
        self.emit(f"{name} = {expression}")
        return name

    @contextmanager
    def guarded(self, guard: tuple[Register, bool] | None) -> Iterator[None]:
        """What is emitted inside runs for the lanes whose guard holds."""
        if guard is None:
            yield
            return
        register, negated = guard
        predicate = ("~" if negated else "") + self.view(register, NUMPY["pred"])
        outer = self.mask
        self.mask = self.let(f"{outer or True} & {predicate}", "g")
        self.emit(f"if {self.mask}.any():")
        self._indent += 1
        before = dict(self._fragments)
        yield
        self.emit("pass")
        self._fragments = {k: v for k, v in before.items() if self._fragments.get(k) == v}
        self._indent -= 1
        self.mask = outer

    def lanes(self) -> str:
        """Indices of the lanes that take part, or `None` for all of them."""
        if self.mask is None:
            return "None"
        if self.mask not in self._lanes:
            name = self.name("L")
            if self.mask == "m":
                self._body.insert(0, (0, f"    {name} = flatnonzero(m)"))
            else:
                self.emit(f"{name} = flatnonzero({self.mask})")
            self._lanes[self.mask] = name
        return self._lanes[self.mask]

    # Operands.

    def view(self, register: Register, kind: np.dtype[Any]) -> str:
        index = self.layout.view(register, kind)
        return self._used.setdefault(index, f"r{index}")

    def constant(self, value: Any, kind: np.dtype[Any], bits: int = 0) -> str:
        """A one-element array. With `bits` bytes the value is a bit pattern of that width."""
        if bits:
            array = np.array([value & ((1 << 8 * bits) - 1)], UNSIGNED[bits]).view(kind)[:1]
        elif kind.kind in "iu":
            size = kind.itemsize
            array = np.array([int(value) & ((1 << 8 * size) - 1)], UNSIGNED[size]).view(kind)
        else:
            array = np.array([value], kind)
        key = (kind.str, int.from_bytes(array.tobytes(), "little"))
        if key not in self._constants:
            self._constants[key] = f"c{len(self._constants)}"
            self.namespace[self._constants[key]] = array
        return self._constants[key]

    def value(self, operand: Operand, kind: str) -> str:
        """An operand read as a PTX type: `[lanes]`, `[1]` if constant, `[2 * lanes]` if packed."""
        target = NUMPY[kind]
        if isinstance(operand, Register):
            have, want = BYTES[operand.type], BYTES[kind]
            if have == want:
                return self.view(operand, target)
            if have < want:
                raise UnsupportedInstruction(f"line {self.line}: {operand.name} is narrower than .{kind}")
            return f"{self.view(operand, UNSIGNED[have])}.astype('{UNSIGNED[want].str}').view('{target.str}')"
        if isinstance(operand, Negated):
            return "~" + self.view(operand.register, target)
        if isinstance(operand, Immediate):
            return self._immediate(operand, kind)
        if isinstance(operand, Special):
            if operand.name not in special.NAMES:
                raise UnsupportedInstruction(f"line {self.line}: unknown special register %{operand.name}")
            return f"row.special({operand.name!r}).astype('{UNSIGNED[BYTES[kind]].str}').view('{target.str}')"
        if isinstance(operand, Symbol):
            return self.constant(self.address_of(operand), UNSIGNED[BYTES[kind]])
        raise UnsupportedInstruction(f"line {self.line}: unexpected operand {operand}")

    def _immediate(self, operand: Immediate, kind: str) -> str:
        target, size = NUMPY[kind], BYTES[kind]
        if kind == "pred":
            return self.constant(bool(operand.value), target)
        if kind.endswith("x2"):
            packed = self.constant(operand.value, UNSIGNED[4], 4)
            return f"repeat({packed}, row.n).view('{target.str}')"
        if operand.width and is_float(kind) and operand.width != size:
            have = np.array([operand.value], UNSIGNED[operand.width]).view(f"f{operand.width}")[0]
            return self.constant(float(have), target)
        if is_float(kind) and not operand.width and size >= 4:
            return self.constant(float(operand.value), target)
        return self.constant(operand.value, target, size)

    def address_of(self, symbol: Symbol) -> int:
        if symbol.name not in self.layout.addresses:
            raise UnsupportedInstruction(f"line {self.line}: unknown variable {symbol.name}")
        space, address = self.layout.addresses[symbol.name]
        return address + symbol.offset + (GLOBAL_BASE if space in ("global", "const") else 0)

    # Results.

    def put(self, operand: Operand, kind: str, expression: str) -> None:
        """Write an expression of a PTX type to a register, extended if the register is wider."""
        if operand is None:
            return
        destination = self._destination(operand)
        have, want = BYTES[destination.type], BYTES[kind]
        if have < want:
            raise UnsupportedInstruction(f"line {self.line}: {destination.name} is narrower than .{kind}")
        if have > want:
            target = (SIGNED if is_signed(kind) else UNSIGNED)[have]
            if is_float(kind):
                expression = f"{expression}.view('{UNSIGNED[want].str}')"
        elif kind.endswith("x2"):
            target, expression = UNSIGNED[4], f"{expression}.view('u4')"
        else:
            target = NUMPY[kind]
        where = f", where={self.mask}" if self.mask else ""
        self.emit(f"copyto({self.view(destination, target)}, {expression}{where})")
        self.written(destination)

    def call(self, operand: Operand, kind: str, function: str, *arguments: str) -> None:
        """Write `function(*arguments)` to a register; a ufunc writes in place where nothing is masked."""
        from .runtime import NAMESPACE

        in_place = self.mask is None and isinstance(NAMESPACE[function], np.ufunc)
        if in_place and isinstance(operand, Register) and BYTES[operand.type] == BYTES[kind]:
            self.emit(f"{function}({', '.join(arguments)}, out={self.view(operand, NUMPY[kind])})")
            self.written(operand)
            return
        self.put(operand, kind, f"{function}({', '.join(arguments)})")

    def scatter(self, operand: Operand, kind: str, expression: str) -> None:
        """Write values of the lanes that take part, `[n]` and unsigned, to a register."""
        if operand is None:
            return
        destination = self._destination(operand)
        have, want = BYTES[destination.type], BYTES[kind]
        if have < want:
            raise UnsupportedInstruction(f"line {self.line}: {destination.name} is narrower than .{kind}")
        if have > want and is_signed(kind):
            expression, target = f"{expression}.view('{SIGNED[want].str}')", SIGNED[have]
        else:
            target = UNSIGNED[have]
        self.emit(f"{self.view(destination, target)}[{self.lanes() if self.mask else ':'}] = {expression}")
        self.written(destination)

    def _destination(self, operand: Operand) -> Register:
        if not isinstance(operand, Register):
            raise UnsupportedInstruction(f"line {self.line}: {operand} is no register to write to")
        return operand

    # Matrix fragments: built once from their registers and kept until one of these changes.

    def fragment(self, role: str, registers: tuple[Operand, ...], expression: str) -> str:
        key = self._key(role, registers)
        if key not in self._fragments:
            self._fragments[key] = self.let(expression, "f")
        return self._fragments[key]

    def keep_fragment(self, role: str, registers: tuple[Operand, ...], name: str) -> None:
        self._fragments[self._key(role, registers)] = name

    def _key(self, role: str, registers: tuple[Operand, ...]) -> tuple[str, tuple[Register, ...]]:
        """A fragment holds the warps of one mask only."""
        return f"{role} {self.mask}", tuple(r for r in registers if isinstance(r, Register))

    def written(self, register: Operand) -> None:
        """Forget the fragments that were built from a register."""
        stale = [key for key in self._fragments if register in key[1]]
        for key in stale:
            del self._fragments[key]

    # The whole.

    def finish(self, filename: str) -> tuple[Callable[..., None], list[int]]:
        """The function, and for every line of its Python the line of the PTX."""
        from .runtime import NAMESPACE

        head = ["def segment(V, row, m):"]
        head += [f"    {name} = V[{index}]" for index, name in self._used.items()]
        source = "\n".join(head + [text for _, text in self._body] + ["    return None"]) + "\n"
        lines = [0] * len(head) + [line for line, _ in self._body] + [0]
        scope = {**NAMESPACE, **self.namespace}
        exec(compile(source, filename, "exec"), scope)
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        return scope["segment"], lines


def items(operand: Operand) -> tuple[Operand, ...]:
    """The elements of a vector operand, or the operand itself."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def compile_segment(segment: Segment, layout: Layout, masked: bool) -> tuple[Callable[..., None], list[int]]:
    """A function `segment(views, row, mask)` that runs the body of a segment, and its map of lines."""
    from .lowering import lower

    emitter = Emitter(layout, masked)
    for instruction in segment.body:
        emitter.line = instruction.line
        with emitter.guarded(instruction.guard):
            lower(emitter, Operation(instruction))
    return emitter.finish(f"<{layout.name}, PTX line {segment.line}, {'masked' if masked else 'full'}>")
