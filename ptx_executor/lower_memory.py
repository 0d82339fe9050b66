"""Loads, stores, atomics, asynchronous copies, addresses: from PTX to calls of the row of warps."""

from __future__ import annotations

from .codegen import Emitter, Operation, items
from .dtypes import BYTES, NUMPY
from .memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_BITS
from .program import Address, Operand, Register, Symbol

_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
_SPACES = ("global", "shared", "shared::cta", "local", "const", "param", "param::entry", "param::func")
# Caching, ordering and scope: the executor has no caches and runs instructions in order.
_HINTS = (
    "weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "sc", "cta", "cluster", "gpu", "sys",
    "ca", "cg", "cs", "lu", "cv", "wb", "wt",
)  # fmt: skip


def _space(op: Operation) -> str:
    """The state space of an access; `generic` if it names none."""
    op.flag(*_HINTS)
    op.drop("L1::", "L2::", "level::")
    return op.choice(*_SPACES, default="generic").split("::")[0].replace("const", "global")


def address(e: Emitter, operand: Operand) -> str:
    """The expression of an address operand: `[lanes]` or `[1]`."""
    assert isinstance(operand, Address)
    base, offset = operand.base, operand.offset
    if isinstance(base, Register):
        kind = f"u{8 * BYTES[base.type]}"
        value = e.value(base, kind)
        return f"add({value}, {e.constant(offset, NUMPY[kind])})" if offset else value
    if isinstance(base, Symbol):
        return e.constant(e.address_of(base) + offset, NUMPY["u64"])
    return e.constant(base.value + offset, NUMPY["u64"])


def _space_of(e: Emitter, operand: Operand, space: str) -> str:
    """`.param` also names the space of the arguments of a call, which are local variables here."""
    if space == "param" and isinstance(operand, Address) and isinstance(operand.base, Symbol):
        return e.layout.addresses.get(operand.base.name, (space, 0))[0]
    return space


def load(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    count = int(op.choice("v2", "v4", "v8", default="v1")[1])
    unchanging = op.flag("nc")
    space = _space_of(e, op.operands[1], _space(op))
    # A cache policy may follow; it has no effect.
    destination, source = op.operands[:2]
    where = f"'{space}', {address(e, source)}, {e.lanes()}"
    values = e.let(f"row.load({where}, {BYTES[kind]}, {count}, {e.line}, {unchanging})")
    for i, item in enumerate(items(destination)):
        e.scatter(item, kind, f"{values}[:, {i}]")


def store(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    op.choice("v2", "v4", "v8")
    space = _space_of(e, op.operands[0], _space(op))
    destination, source = op.operands[:2]
    values = ", ".join(e.value(item, kind) for item in items(source))
    where = f"'{space}', {address(e, destination)}, {e.lanes()}"
    e.emit(f"row.store({where}, [{values}], {BYTES[kind]}, {e.line})")


def atomic(e: Emitter, op: Operation) -> None:
    """atom and red."""
    kind = op.kind()
    op.flag("noftz")
    action = op.choice("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    space = _space(op)
    has_result = op.opcode == "atom"
    destination = op.operands[0] if has_result else None
    where, *values = op.operands[1:] if has_result else op.operands
    if isinstance(destination, Register) and destination in e.layout.unread:
        destination = None
    arguments = ", ".join(e.value(value, kind) for value in values[: 2 if action == "cas" else 1])
    call = f"row.atomic('{space}', '{action}', '{kind}', {address(e, where)}, {e.lanes()}, [{arguments}], "
    call += f"{destination is not None}, {e.line})"
    if destination is None:
        e.emit(call)
    else:
        e.scatter(destination, f"b{8 * BYTES[kind]}", e.let(call))


def copy_async(e: Emitter, op: Operation) -> None:
    """cp.async, its commit_group, wait_group and wait_all."""
    if not op.flag("async"):
        raise op.unsupported("only cp.async is implemented")
    if op.flag("commit_group"):
        return e.emit(f"row.copies.commit({e.lanes()})")
    if op.flag("wait_all"):
        return e.emit(f"row.copies.wait({e.lanes()}, None)")
    if op.flag("wait_group"):
        return e.emit(f"row.copies.wait({e.lanes()}, {getattr(op.operands[0], 'value', 0)})")
    has_policy = "L2::cache_hint" in op.instruction.mods
    op.flag("ca", "cg", "shared", "shared::cta", "global")
    op.drop("L2::")
    destination, source, size, *rest = op.operands[: -1 if has_policy else None]
    count = getattr(size, "value", None)
    if count not in (4, 8, 16):
        raise op.unsupported("the size of a copy is 4, 8 or 16")
    used = "None"
    if rest and isinstance(rest[0], Register) and rest[0].type == "pred":
        used = f"where({e.value(rest[0], 'pred')}, 0, {count})"
    elif rest:
        used = e.value(rest[0], "u32")
    where = f"{address(e, destination)}, {address(e, source)}, {e.lanes()}"
    return e.emit(f"row.copies.start({where}, {count}, {used}, {e.line})")


def convert_address(e: Emitter, op: Operation) -> None:
    """cvta: a window of the generic addresses belongs to each space but global, whose addresses stay."""
    kind = op.kind()
    back = op.flag("to")
    space = _space(op)
    value = e.value(op.operands[1], kind)
    if space in _WINDOWS:
        value = f"{'subtract' if back else 'add'}({value}, {e.constant(_WINDOWS[space], NUMPY[kind])})"
    e.put(op.operands[0], kind, value)


def is_space(e: Emitter, op: Operation) -> None:
    space = _space(op)
    value = f"({e.value(op.operands[1], 'u64')} >> {e.constant(WINDOW_BITS, NUMPY['u64'])})"
    windows = {name: base >> WINDOW_BITS for name, base in _WINDOWS.items()}
    if space in windows:
        return e.put(op.operands[0], "pred", f"({value} == {windows[space]})")
    return e.put(op.operands[0], "pred", f"({value} < {min(windows.values())})")


def _nothing(e: Emitter, op: Operation) -> None:
    """Fences, prefetches and waits for the previous grid: memory is consistent and grids run one by one."""
    op.drop("")


def _policy(e: Emitter, op: Operation) -> None:
    """createpolicy: a cache policy has no effect; its register gets zero."""
    op.drop("")
    e.put(op.operands[0], "b64", e.constant(0, NUMPY["b64"]))


HANDLERS = {
    **dict.fromkeys(("ld", "ldu"), load),
    "st": store,
    **dict.fromkeys(("atom", "red"), atomic),
    "cp": copy_async,
    "cvta": convert_address,
    "isspacep": is_space,
    **dict.fromkeys(("membar", "fence", "prefetch", "prefetchu", "griddepcontrol", "nanosleep"), _nothing),
    "createpolicy": _policy,
}
