"""The parts of a PTX module once it has been read: variables, instructions, kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "Address",
    "Function",
    "Immediate",
    "Instruction",
    "Operand",
    "Program",
    "Register",
    "Special",
    "Symbol",
    "Variable",
    "Vector",
]


@dataclass(frozen=True)
class Register:
    """A virtual register; `type` is the declared PTX type, without its dot."""

    name: str
    type: str


@dataclass(frozen=True)
class Special:
    """A special register such as `%tid.x`, without the per cent sign."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal: an integer, or a float given by its bits (`width` 4 or 8 bytes; 0 for an integer)."""

    value: int
    width: int = 0


@dataclass(frozen=True)
class Symbol:
    """The address of a variable, a label or a function, plus a constant offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`, the `p|q` of two results, or the parenthesised list of a call."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: Register | Symbol | Immediate
    offset: int = 0


@dataclass(frozen=True)
class Negated:
    """`!p`, a predicate operand taken the other way round."""

    register: Register


Operand = Register | Special | Immediate | Symbol | Vector | Address | Negated | None
"""`None` is the sink `_`."""


@dataclass(frozen=True)
class Instruction:
    """One statement: `@guard opcode.mods operands;`. `line` is 1-based in the text of the module."""

    opcode: str
    mods: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None  # the predicate, and whether it is negated
    line: int
    text: str


@dataclass(frozen=True)
class Variable:
    """A variable in memory. `size` in bytes is `None` for `extern .shared name[]`, sized at the launch."""

    name: str
    space: str  # global, const, shared, local, param
    align: int
    size: int | None
    init: tuple[tuple[int, int | Symbol, int], ...] = ()  # (byte offset, value, bytes)
    type: str = ""  # of a parameter; of a struct, b8


@dataclass
class Function:
    """A kernel or a device function. `labels` maps a label to an index into `code`."""

    name: str
    params: list[Variable]
    is_kernel: bool
    returns: list[Variable] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)  # shared and local ones declared inside
    branch_targets: dict[str, tuple[str, ...]] = field(default_factory=dict)  # the tables of `brx.idx`
    required_block: tuple[int, int, int] | None = None  # .reqntid
    max_block: tuple[int, int, int] | None = None  # .maxntid


@dataclass
class Program:
    """A whole module."""

    version: str = ""
    target: str = ""
    variables: list[Variable] = field(default_factory=list)
    functions: dict[str, Function] = field(default_factory=dict)
    external: set[str] = field(default_factory=set)  # functions that are declared, not defined
