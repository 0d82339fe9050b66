"""Arithmetic, logic, comparisons, moves and conversions: from PTX to calls of numpy."""

from __future__ import annotations

from .codegen import Emitter, Operation, items
from .dtypes import BYTES, is_float, is_half, is_signed
from .program import Immediate, Operand, Register, Vector

CARRY = Register("%carry", "pred")
_ROUNDING = ("rn", "rz", "rm", "rp", "rna")
_INTEGRAL = ("rni", "rzi", "rmi", "rpi")


def _wide(e: Emitter, operand: Operand, kind: str) -> str:
    """An operand in the type it is computed in: halves in float32."""
    value = e.value(operand, kind)
    return f"widen_{kind.removesuffix('x2')}({value})" if is_half(kind) else value


def _put_float(
    e: Emitter, destination: Operand, kind: str, expression: str, ftz: bool, sat: bool, relu: bool
) -> None:
    """Write a float computed in float32 or wider, with what its modifiers ask for."""
    if relu:
        expression = f"maximum({expression}, 0)"
    if sat:
        expression = f"saturate({expression})"
    if is_half(kind):
        expression = f"narrow_{kind.removesuffix('x2')}({expression})"
    elif ftz and kind == "f32":
        expression = f"flush({expression})"
    e.put(destination, kind, expression)


def float_arithmetic(e: Emitter, op: Operation, kind: str) -> None:
    """add, sub, mul, div, fma, sqrt, rcp of every float type."""
    name = "fma" if op.opcode == "mad" else op.opcode
    mode = op.choice("approx", "full", *_ROUNDING)
    ftz, sat, relu = op.flag("ftz"), op.flag("sat"), op.flag("relu")
    destination, *sources = op.operands
    values = [_wide(e, source, kind) for source in sources]
    if ftz and kind == "f32":
        values = [f"flush({value})" for value in values]
    directed = mode in ("rz", "rm", "rp")
    if directed and kind != "f32":
        raise op.unsupported(f".{mode} is implemented for f32 only")
    if directed:
        if name == "rcp":
            name, values = "div", [e.constant(1.0, _F32), *values]
        function = {"add": "add_odd", "sub": "sub_odd", "fma": "fma_odd"}.get(name, f"{name}_wide")
        return _put_float(
            e, destination, kind, f"directed({function}({', '.join(values)}), '{mode}')", ftz, sat, relu
        )
    functions = {
        "add": "add",
        "sub": "subtract",
        "mul": "multiply",
        "div": "divide",
        "sqrt": "sqrt",
        "rcp": "rcp",
    }
    functions["fma"] = "fma_odd" if is_half(kind) else f"fma_{kind}"
    if not (ftz or sat or relu or is_half(kind)):
        return e.call(destination, kind, functions[name], *values)
    return _put_float(e, destination, kind, f"{functions[name]}({', '.join(values)})", ftz, sat, relu)


def float_function(e: Emitter, op: Operation) -> None:
    """ex2, lg2, sin, cos, tanh, rsqrt."""
    kind = op.kind()
    op.flag("approx")
    ftz = op.flag("ftz")
    names = {
        "ex2": "exp2",
        "lg2": "log2",
        "sin": "sin",
        "cos": "cos",
        "tanh": "tanh_approx",
        "rsqrt": "rsqrt",
    }
    value = _wide(e, op.operands[1], kind)
    if ftz and kind == "f32":
        value = f"flush({value})"
    _put_float(e, op.operands[0], kind, f"{names[op.opcode]}({value})", ftz, False, False)


def add_sub(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    if is_float(kind):
        return float_arithmetic(e, op, kind)
    carry_out, saturating = op.flag("cc"), op.flag("sat")
    destination, a, b = op.operands
    x, y = e.value(a, kind), e.value(b, kind)
    if op.opcode in ("addc", "subc") or carry_out:
        unsigned = f"b{8 * BYTES[kind]}"
        return _with_carry(
            e, op, destination, unsigned, e.value(a, unsigned), e.value(b, unsigned), carry_out
        )
    if saturating:
        return e.put(destination, kind, f"{op.opcode}_sat({x}, {y})")
    return e.call(destination, kind, {"add": "add", "sub": "subtract"}[op.opcode], x, y)


def _with_carry(
    e: Emitter, op: Operation, destination: Operand, kind: str, a: str, b: str, carry_out: bool
) -> None:
    """a + b or a - b of unsigned values, with the carry that the opcode reads or `.cc` writes."""
    carry_in = e.value(CARRY, "pred") if op.opcode in ("addc", "subc", "madc") else "False"
    result = e.let(f"with_carry({a}, {b}, {carry_in}, {op.opcode.startswith('sub')})")
    e.put(destination, kind, f"{result}[0]")
    if carry_out:
        e.put(CARRY, "pred", f"{result}[1]")


def multiply(e: Emitter, op: Operation) -> None:
    """mul, mad, madc (lo, hi, wide) and fma."""
    kind = op.kind()
    if is_float(kind):
        return float_arithmetic(e, op, kind)
    part, carry_out = op.choice("lo", "hi", "wide", default="lo"), op.flag("cc")
    destination, a, b, *rest = op.operands
    x, y = e.value(a, kind), e.value(b, kind)
    result = kind[0] + str(16 * BYTES[kind]) if part == "wide" else kind
    function = {"lo": "multiply", "hi": "mul_hi", "wide": "widen"}[part]
    if not rest:
        return e.call(destination, result, function, x, y)
    if carry_out or op.opcode == "madc":
        unsigned = f"b{8 * BYTES[kind]}"
        product = f"{function}({x}, {y}).view('{_dtype(unsigned).str}')"
        return _with_carry(e, op, destination, unsigned, product, e.value(rest[0], unsigned), carry_out)
    return e.call(destination, result, "add", f"{function}({x}, {y})", e.value(rest[0], result))


def divide(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    if is_float(kind):
        return float_arithmetic(e, op, kind)
    function = {"div": "int_div", "rem": "int_rem"}[op.opcode]
    return e.call(
        op.operands[0], kind, function, e.value(op.operands[1], kind), e.value(op.operands[2], kind)
    )


def min_max(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    x, y = (_wide(e, operand, kind) for operand in op.operands[1:])
    if not is_float(kind):
        return e.call(op.operands[0], kind, {"min": "minimum", "max": "maximum"}[op.opcode], x, y)
    nan, ftz = op.flag("NaN"), op.flag("ftz")
    function = f"{op.opcode}imum" if nan else f"f{op.opcode}"
    if not ftz and not is_half(kind):
        return e.call(op.operands[0], kind, function, x, y)
    return _put_float(e, op.operands[0], kind, f"{function}({x}, {y})", ftz, False, False)


def negate_abs(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    ftz = op.flag("ftz")
    if kind.startswith("bf16"):
        # Only the sign bit changes, for NaN too.
        value = e.value(op.operands[1], kind)
        flip = "0x8000" if op.opcode == "neg" else "0x7fff"
        return e.put(op.operands[0], kind, f"({value} {'^' if op.opcode == 'neg' else '&'} uint16({flip}))")
    function = {"neg": "negative", "abs": "absolute"}[op.opcode]
    if ftz and kind == "f32":
        return e.put(op.operands[0], kind, f"flush({function}({e.value(op.operands[1], kind)}))")
    return e.call(op.operands[0], kind, function, e.value(op.operands[1], kind))


def bitwise(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    names = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "not": "invert"}
    values = [e.value(operand, kind) for operand in op.operands[1:]]
    if op.opcode == "cnot":
        return e.put(op.operands[0], kind, f"({values[0]} == 0).astype({values[0]}.dtype)")
    return e.call(op.operands[0], kind, names[op.opcode], *values)


def shift(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    destination, a, by = op.operands
    if isinstance(by, Immediate) and 0 <= by.value < 8 * BYTES[kind]:
        function = {"shl": "left_shift", "shr": "right_shift"}[op.opcode]
        amount = e.constant(by.value, _dtype(kind))
        return e.call(destination, kind, function, e.value(a, kind), amount)
    function = {"shl": "shift_left", "shr": "shift_right"}[op.opcode]
    return e.call(destination, kind, function, e.value(a, kind), e.value(by, "u32"))


def bit_field(e: Emitter, op: Operation) -> None:
    """bfe, bfi, bmsk, shf, prmt, lop3, popc, clz, bfind, brev, dp4a."""
    if op.opcode == "dp4a":
        right, left = op.kind(), op.kind()
        values = [e.value(operand, "b32") for operand in op.operands[1:]]
        signs = f"{is_signed(left)}, {is_signed(right)}"
        return e.put(op.operands[0], "b32", f"dot_bytes({', '.join(values)}, {signs})")
    kind = op.kind()
    destination, *sources = op.operands
    if op.opcode == "lop3":
        table = sources.pop()
        if not isinstance(table, Immediate):
            raise op.unsupported("the truth table is not a constant")
        values = [e.value(source, kind) for source in sources]
        return e.put(destination, kind, f"lop3({', '.join(values)}, {table.value})")
    if op.opcode == "shf":
        is_left, wrap = op.choice("l", "r") == "l", op.choice("wrap", "clamp") == "wrap"
        values = [e.value(source, "u32") for source in sources]
        return e.put(destination, "b32", f"funnel_shift({', '.join(values)}, {is_left}, {wrap})")
    if op.opcode == "bmsk":
        wrap = op.choice("wrap", "clamp") == "wrap"
        start, width = (e.value(source, "u32") for source in sources)
        return e.put(destination, "b32", f"bit_mask({start}, {width}, {wrap})")
    if op.opcode in ("bfe", "bfi"):
        n = 1 if op.opcode == "bfe" else 2
        values = [e.value(s, kind) for s in sources[:n]] + [e.value(s, "u32") for s in sources[n:]]
        return e.put(
            destination, kind, f"{'bit_field_extract' if n == 1 else 'bit_field_insert'}({', '.join(values)})"
        )
    values = [e.value(source, kind) for source in sources]
    if op.opcode == "prmt":
        return e.put(destination, kind, f"permute_bytes({', '.join(values)})")
    if op.opcode == "brev":
        return e.put(destination, kind, f"reverse_bits({values[0]})")
    if op.opcode == "bfind":
        return e.put(destination, "u32", f"find_leading({values[0]}, {op.flag('shiftamt')})")
    return e.put(
        destination, "u32", f"{ {'popc': 'popcount', 'clz': 'leading_zeros'}[op.opcode] }({values[0]})"
    )


_COMPARISONS = {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal",
    "gt": "greater", "ge": "greater_equal",
    "lo": "less", "ls": "less_equal", "hi": "greater", "hs": "greater_equal",
}  # fmt: skip
_UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")


def compare(e: Emitter, op: Operation) -> None:
    """setp and set."""
    kind = op.kind()
    result = op.kind() if op.opcode == "set" else "pred"
    relation = op.choice(*_COMPARISONS, *_UNORDERED)
    combine = op.choice("and", "or", "xor")
    ftz = op.flag("ftz")
    destination, a, b, *third = op.operands
    x, y = _wide(e, a, kind), _wide(e, b, kind)
    if ftz and kind == "f32":
        x, y = f"flush({x})", f"flush({y})"
    arguments = [x, y]
    if relation in _UNORDERED:
        function, arguments = "compare", [f"'{relation}'", x, y]
    else:
        function = "not_equal_ordered" if relation == "ne" and is_float(kind) else _COMPARISONS[relation]
    first, second = (*items(destination), None)[:2]
    if not combine and second is None and result == "pred":
        return e.call(first, "pred", function, *arguments)
    truth = e.let(f"{function}({', '.join(arguments)})")
    symbol = {"and": "&", "or": "|", "xor": "^", "": ""}[combine]
    other = e.let(e.value(third[0], "pred")) if combine else ""
    outcomes = (
        [f"{truth} {symbol} {other}", f"~{truth} {symbol} {other}"] if combine else [truth, f"~{truth}"]
    )
    if result != "pred":
        ones = {"f16": 0x3C00, "bf16": 0x3F80, "f32": 0x3F800000}.get(result.removesuffix("x2"), -1)
        one = e.constant(ones, _dtype(result), _dtype(result).itemsize)
        return e.put(first, result, f"where({outcomes[0]}, {one}, {e.constant(0, _dtype(result))})")
    second_value = e.let(outcomes[1]) if second is not None else ""
    e.put(first, "pred", outcomes[0])
    if second is not None:
        e.put(second, "pred", second_value)
    return None


def select(e: Emitter, op: Operation) -> None:
    """selp and slct."""
    if op.opcode == "slct":
        by = op.kind()
        kind = op.kind()
        op.flag("ftz")
        chosen = f"{e.value(op.operands[3], by)} >= 0"
    else:
        kind = op.kind()
        chosen = e.value(op.operands[3], "pred")
    e.put(
        op.operands[0],
        kind,
        f"where({chosen}, {e.value(op.operands[1], kind)}, {e.value(op.operands[2], kind)})",
    )


def move(e: Emitter, op: Operation) -> None:
    """mov, with packing and unpacking of vectors."""
    kind = op.kind()
    destination, source = op.operands
    if isinstance(source, Vector):
        part = f"b{8 * BYTES[kind] // len(source.items)}"
        return e.put(
            destination,
            kind,
            f"pack([{', '.join(e.value(s, part) for s in source.items)}], '{_dtype(kind).str}')",
        )
    if isinstance(destination, Vector):
        part = f"b{8 * BYTES[kind] // len(destination.items)}"
        parts = e.let(f"unpack({e.value(source, kind)}, '{_dtype(part).str}', {len(destination.items)})")
        for i, item in enumerate(destination.items):
            e.put(item, part, f"{parts}[:, {i}]")
        return None
    return e.put(destination, kind, e.value(source, kind))


def convert(e: Emitter, op: Operation) -> None:
    source = op.kind()
    kind = op.kind()
    mode = op.choice(*_INTEGRAL, *_ROUNDING)
    ftz, sat, relu = op.flag("ftz"), op.flag("sat", "satfinite"), op.flag("relu")
    destination, *sources = op.operands
    if kind in ("f16x2", "bf16x2"):
        high, low = (e.value(s, source) for s in sources)
        return e.put(destination, "b32", f"pack_halves({high}, {low}, '{kind}', '{mode}', {relu})")
    if kind == "e4m3x2":
        if (source, mode, sat) != ("f32", "rn", True):
            raise op.unsupported("of FP8 there is cvt.rn.satfinite{.relu}.e4m3x2.f32")
        high, low = (e.value(s, source) for s in sources)
        return e.put(destination, "b16", f"pack_e4m3({high}, {low}, {relu})")
    if kind == "tf32":
        return e.put(destination, "b32", f"to_tf32({e.value(sources[0], source)}, {mode == 'rna'})")
    if not is_float(source) and not is_float(kind) and not sat:
        return e.put(destination, kind, f"{e.value(sources[0], source)}.astype('{_dtype(kind).str}')")
    arguments = f"'{source}', '{kind}', '{mode}', {ftz}, {sat}, {relu}"
    return e.put(destination, kind, f"convert({e.value(sources[0], source)}, {arguments})")


def copysign(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    e.call(op.operands[0], kind, "copysign", e.value(op.operands[2], kind), e.value(op.operands[1], kind))


def testp(e: Emitter, op: Operation) -> None:
    kind = op.kind()
    what = op.choice("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    e.put(op.operands[0], "pred", f"testp({e.value(op.operands[1], kind)}, '{what}')")


def _dtype(kind: str):  # type: ignore[no-untyped-def]
    from .dtypes import NUMPY

    return NUMPY[kind]


_F32 = _dtype("f32")

HANDLERS = {
    **dict.fromkeys(("add", "sub", "addc", "subc"), add_sub),
    **dict.fromkeys(("mul", "mad", "madc", "fma"), multiply),
    **dict.fromkeys(("div", "rem"), divide),
    **dict.fromkeys(("min", "max"), min_max),
    **dict.fromkeys(("neg", "abs"), negate_abs),
    **dict.fromkeys(("and", "or", "xor", "not", "cnot"), bitwise),
    **dict.fromkeys(("shl", "shr"), shift),
    **dict.fromkeys(
        ("bfe", "bfi", "bmsk", "shf", "prmt", "lop3", "popc", "clz", "bfind", "brev", "dp4a"), bit_field
    ),
    **dict.fromkeys(("setp", "set"), compare),
    **dict.fromkeys(("selp", "slct"), select),
    **dict.fromkeys(("ex2", "lg2", "sin", "cos", "tanh", "rsqrt"), float_function),
    **dict.fromkeys(("sqrt", "rcp"), lambda e, op: float_arithmetic(e, op, op.kind())),
    "mov": move,
    "cvt": convert,
    "copysign": copysign,
    "testp": testp,
}
