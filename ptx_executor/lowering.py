"""The table of opcodes, from which everything that can be executed can be read."""

from __future__ import annotations

from collections.abc import Callable

from . import lower_arithmetic, lower_memory, lower_warp
from .codegen import Emitter, Operation

HANDLERS: dict[str, Callable[[Emitter, Operation], None]] = {
    **lower_arithmetic.HANDLERS,
    **lower_memory.HANDLERS,
    **lower_warp.HANDLERS,
}


def _trap(e: Emitter, op: Operation) -> None:
    e.emit(f"row.trap({e.lanes()}, {op.instruction.text!r})")


def _call(e: Emitter, op: Operation) -> None:
    """Calls of the two functions outside every module; those of the module are inlined before."""
    names = {getattr(operand, "name", "") for operand in op.operands}
    op.flag("uni")
    if "__assertfail" in names:
        e.emit(f"row.trap({e.lanes()}, 'assertion failed')")
    elif "vprintf" not in names:
        raise op.unsupported("call of a function that is not defined in the module")


HANDLERS |= {"trap": _trap, "brkpt": _trap, "call": _call}


def lower(e: Emitter, op: Operation) -> None:
    """Emit the Python of one instruction.

    Raises:
        UnsupportedInstruction: naming the line, for an opcode, modifier or type that is not implemented.
    """
    handler = HANDLERS.get(op.opcode)
    if handler is None:
        raise op.unsupported(f"unknown opcode {op.opcode}")
    handler(e, op)
    op.done()
