"""Operands of instructions, and the scopes of their names."""

from __future__ import annotations

from .program import Address, Immediate, Negated, Operand, Register, Special, Symbol, Vector
from .tokens import Cursor, integer


class Scope:
    """Names between a pair of braces; inline assembly opens its own."""

    def __init__(self, parent: Scope | None, suffix: str) -> None:
        self.parent, self.suffix = parent, suffix
        self.registers: dict[str, Register] = {}
        self.symbols: dict[str, str] = {}
        self.jumps: list[int] = []  # instructions whose label is not resolved yet

    def register(self, name: str) -> Register | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.registers:
                return scope.registers[name]
            scope = scope.parent
        return None

    def symbol(self, name: str) -> str:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.symbols:
                return scope.symbols[name]
            scope = scope.parent
        return name


class OperandReader(Cursor):
    """Reads one operand at the cursor."""

    def _operand(self, scope: Scope) -> Operand:
        token = self._peek()
        if token in ("{", "("):
            return self._list(scope, "}" if token == "{" else ")")
        if token == "[":
            return self._address(scope)
        self._next()
        if token == "!":
            register = scope.register(self._next())
            if register is None:
                raise self._error("unknown predicate")
            return Negated(register)
        if token == "-":
            literal = self._literal(self._next())
            return Immediate(-literal.value, literal.width)
        if token[0].isdigit():
            return self._literal(token)
        if token == "_":
            first: Operand = None
        else:
            register = scope.register(token)
            if register is None and not (token[0].isalpha() or token[0] in "_$%"):
                self._at -= 1
                raise self._error(f"unexpected {token!r}")
            if register is None:
                return self._name(token, scope)
            first = register
        if self._accept("|"):
            return Vector((first, self._operand(scope)))
        return first

    def _name(self, token: str, scope: Scope) -> Operand:
        if token.startswith("%"):
            return Special(token[1:])
        if token == "WARP_SZ":
            return Immediate(32)
        if token == "generic" and self._accept("("):
            inner = self._operand(scope)
            self._expect(")")
            return inner
        offset = 0
        while self._peek() in ("+", "-"):
            sign = 1 if self._next() == "+" else -1
            offset += sign * self._integer()
        return Symbol(scope.symbol(token), offset)

    def _literal(self, token: str) -> Immediate:
        if token[:2] in ("0f", "0F"):
            return Immediate(int(token[2:], 16), 4)
        if token[:2] in ("0d", "0D"):
            return Immediate(int(token[2:], 16), 8)
        try:
            return Immediate(integer(token))
        except ValueError:
            raise self._error(f"unsupported literal {token!r}") from None

    def _list(self, scope: Scope, closing: str) -> Vector:
        self._next()
        items = []
        while not self._accept(closing):
            items.append(self._operand(scope))
            self._accept(",")
        return Vector(tuple(items))

    def _address(self, scope: Scope) -> Address:
        self._next()
        base = self._operand(scope)
        offset = 0
        while self._peek() in ("+", "-"):
            sign = 1 if self._next() == "+" else -1
            offset += sign * self._integer()
        self._expect("]")
        if isinstance(base, Symbol):
            return Address(Symbol(base.name), base.offset + offset)
        if not isinstance(base, Register | Immediate):
            raise self._error("an address is a register, a variable or a number, plus an offset")
        return Address(base, offset)
