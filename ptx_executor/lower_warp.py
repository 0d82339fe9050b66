"""Instructions of a whole warp: shuffles, votes, reductions, matrices; from PTX to `warps` and `matrices`."""

from __future__ import annotations

from .codegen import Emitter, Operation, items
from .dtypes import BYTES
from .lower_memory import address
from .program import Operand, Register


def shuffle(e: Emitter, op: Operation) -> None:
    op.kind()
    op.flag("sync")
    mode = op.choice("idx", "up", "down", "bfly")
    destination, value, by, control = op.operands[:4]
    arguments = ", ".join([e.value(value, "b32"), e.value(by, "u32"), e.value(control, "u32")])
    result = e.let(f"shuffle('{mode}', {arguments}, row.n, {e.mask})")
    first, second = (*items(destination), None)[:2]
    e.put(first, "b32", f"{result}[0]")
    e.put(second, "pred", f"{result}[1]")


def vote(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    op.flag("sync")
    mode = op.choice("all", "any", "uni", "ballot")
    destination, predicate = op.operands[:2]
    members = e.value(op.operands[2], "b32") if len(op.operands) > 2 else "None"
    e.put(destination, kind, f"vote('{mode}', {e.value(predicate, 'pred')}, {members}, row.n, {e.mask})")


def active_mask(e: Emitter, op: Operation) -> None:
    op.kind()
    e.put(op.operands[0], "b32", f"vote('ballot', ~zeros(1, bool), None, row.n, {e.mask})")


def reduce(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    op.flag("sync")
    action = op.choice("add", "min", "max", "and", "or", "xor")
    destination, value, members = op.operands
    e.put(
        destination,
        kind,
        f"reduce('{action}', {e.value(value, kind)}, {e.value(members, 'b32')}, row.n, {e.mask})",
    )


def match(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    op.flag("sync")
    mode = op.choice("any", "all")
    destination, value, members = op.operands
    result = e.let(f"match({e.value(value, kind)}, {e.value(members, 'b32')}, row.n, {e.mask})")
    first, second = (*items(destination), None)[:2]
    e.put(first, "b32", f"{result}[0]" if mode == "any" else f"where({result}[1], {result}[0], uint32(0))")
    e.put(second, "pred", f"{result}[1]")


def warp_barrier(e: Emitter, op: Operation) -> None:
    """bar.warp.sync: the scheduler has brought the lanes together."""
    op.flag("warp", "sync", "aligned")


def _registers(e: Emitter, operand: Operand, kind: str) -> str:
    return "(" + ", ".join(e.value(item, kind) for item in items(operand)) + ",)"


def _group(e: Emitter, mask: str | None) -> str:
    """The warps that take part, all lanes of each."""
    return f"row.whole_warps({mask}, {e.line})" if mask else "slice(None)"


def load_matrix(e: Emitter, op: Operation) -> None:
    op.kind()
    op.flag("sync", "aligned", "m8n8", "shared", "shared::cta")
    count, transposed = int(op.choice("x1", "x2", "x4", default="x1")[1]), op.flag("trans")
    destination, source = op.operands
    if len(items(destination)) != count:
        raise op.unsupported(f".x{count} takes {count} registers")
    warps = e.let(_group(e, e.mask))
    result = e.let(f"row.load_matrix({address(e, source)}, {warps}, {count}, {transposed}, {e.line})")
    for i, item in enumerate(items(destination)):
        e.scatter(item, "b32", f"{result}[{i}]")


def store_matrix(e: Emitter, op: Operation) -> None:
    op.kind()
    op.flag("sync", "aligned", "m8n8", "shared", "shared::cta")
    count, transposed = int(op.choice("x1", "x2", "x4", default="x1")[1]), op.flag("trans")
    destination, source = op.operands
    if len(items(source)) != count:
        raise op.unsupported(f".x{count} takes {count} registers")
    warps = e.let(_group(e, e.mask))
    values = _registers(e, source, "b32")
    e.emit(f"row.store_matrix({address(e, destination)}, {warps}, {values}, {transposed}, {e.line})")


_SHAPES = {
    "f16": ("m16n8k8", "m16n8k16"),
    "bf16": ("m16n8k8", "m16n8k16"),
    "tf32": ("m16n8k4", "m16n8k8"),
    "s8": ("m16n8k16", "m16n8k32"),
    "u8": ("m16n8k16", "m16n8k32"),
}


def multiply_matrices(e: Emitter, op: Operation) -> None:
    """mma.sync on 16 x 8 tiles: f16, bf16, tf32 and 8-bit integers."""
    c_kind, b_kind, a_kind, d_kind = op.kind(), op.kind(), op.kind(), op.kind()
    op.flag("sync", "aligned", "row", "col")
    shape = op.choice("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32")
    accumulators = ("s32",) if a_kind in ("s8", "u8") else ("f32", "f16") if a_kind == "f16" else ("f32",)
    if shape not in _SHAPES.get(a_kind, ()) or c_kind != d_kind or c_kind not in accumulators:
        raise op.unsupported("no such shape and types of mma")
    if (a_kind in ("s8", "u8")) != (b_kind in ("s8", "u8")) or (
        a_kind not in ("s8", "u8") and a_kind != b_kind
    ):
        raise op.unsupported("the types of a and b do not go together")
    depth = int(shape.split("k")[1])
    per_register = 4 // (BYTES[a_kind] if a_kind != "tf32" else 4)
    d, a, b, c = op.operands
    sizes = (16 * depth // 32 // per_register, 8 * depth // 32 // per_register, 2 if c_kind == "f16" else 4)
    if (len(items(a)), len(items(b)), len(items(c))) != sizes or len(items(d)) != sizes[2]:
        raise op.unsupported("wrong number of registers")
    warps = e.fragment("warps", (), _group(e, e.mask))
    raw = "b32" if c_kind != "f32" else "f32"
    left = e.fragment(f"a {a_kind}", items(a), f"matrix_a({_registers(e, a, 'b32')}, '{a_kind}', {warps})")
    right = e.fragment(f"b {b_kind}", items(b), f"matrix_b({_registers(e, b, 'b32')}, '{b_kind}', {warps})")
    role = f"c {c_kind}"
    constant = not all(isinstance(item, Register) for item in items(c))
    built = f"matrix_c({_registers(e, c, raw)}, '{c_kind}', {warps}, row.n)"
    addend = e.let(built) if constant else e.fragment(role, items(c), built)
    saturate = op.flag("satfinite") and c_kind == "s32"
    result = e.let(f"multiply_add({left}, {right}, {addend}, {saturate})", "d")
    e.emit(f"put_matrix({result}, {_registers(e, d, raw)}, {warps})")
    for item in items(d):
        e.written(item)
    e.keep_fragment(role, items(d), result)


HANDLERS = {
    "shfl": shuffle,
    "vote": vote,
    "activemask": active_mask,
    "redux": reduce,
    "match": match,
    "bar": warp_barrier,
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
    "mma": multiply_matrices,
}
