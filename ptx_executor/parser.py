"""Read PTX text into a `Program`."""

from __future__ import annotations

import dataclasses
import math

from .dtypes import BYTES
from .errors import ParseError
from .operands import OperandReader, Scope
from .program import Function, Immediate, Instruction, Program, Register, Symbol, Variable

_LINKAGE = {".visible", ".extern", ".weak", ".common"}


def parse(text: str) -> Program:
    """Read a module.

    Raises:
        ParseError: naming the line, when the text is not understood.
    """
    return _Parser(text).module()


class _Parser(OperandReader):
    """The grammar of a module, top down."""

    _scopes = 0  # number of scopes so far: a suffix for the names of each

    def module(self) -> Program:
        program = Program()
        while self._peek():
            linkage = set()
            while self._peek() in _LINKAGE:
                linkage.add(self._next())
            token = self._peek()
            if token == ".version":
                self._next()
                program.version = self._next()
            elif token == ".target":
                self._next()
                program.target = self._next()
                while self._accept(","):
                    self._next()
            elif token == ".address_size":
                self._next()
                if self._integer() != 64:
                    raise self._error("only 64-bit addresses are supported")
            elif token == ".section":
                self._at += 2
                self._skip_braces()
            elif token in (".entry", ".func"):
                self._function(program)
            elif token in (".global", ".const", ".shared"):
                program.variables += self._variables()
            elif token == ".pragma":
                while self._next() != ";":
                    pass
            else:
                raise self._error(f"unexpected {token!r}")
        return program

    def _variables(self) -> list[Variable]:
        """`.space .align n .type name[..] = {..}, ...;`"""
        space, align, found = self._next()[1:], 0, []
        if self._accept(".attribute"):
            while self._next() != ")":
                pass
        vector = 1
        while True:
            token = self._next()
            if token == ".align":
                align = self._integer()
            elif token in (".v2", ".v4"):
                vector = int(token[2])
            elif token[1:] in BYTES:
                element = BYTES[token[1:]] * vector
                break
            else:
                raise self._error(f"unexpected {token!r} in a declaration")
        while True:
            name, shape, is_open = self._next(), [], False
            while self._accept("["):
                if self._accept("]"):
                    is_open = True
                else:
                    shape.append(self._integer())
                    self._expect("]")
            init = self._initialiser(element // vector) if self._accept("=") else ()
            size = None if is_open and not init else element * math.prod(shape)
            found.append(Variable(name, space, align or element, size, init))
            if not self._accept(","):
                break
        self._expect(";")
        return found

    def _initialiser(self, element: int) -> tuple[tuple[int, int | Symbol, int], ...]:
        values: list[tuple[int, int | Symbol, int]] = []
        depth = 0
        while True:
            token = self._peek()
            if token == "{":
                depth += 1
                self._next()
            elif token == "}":
                depth -= 1
                self._next()
            elif token == ",":
                self._next()
            else:
                operand = self._operand(Scope(None, ""))
                if isinstance(operand, Immediate):
                    values.append((len(values) * element, operand.value, element))
                elif isinstance(operand, Symbol):
                    values.append((len(values) * element, operand, element))
                else:
                    raise self._error("unexpected initialiser")
            if depth == 0:
                return tuple(values)

    def _parameters(self, function: str) -> list[Variable]:
        found: list[Variable] = []
        if not self._accept("("):
            return found
        while not self._accept(")"):
            self._expect(".param") if self._peek() == ".param" else self._expect(".reg")
            align, size, kind = 0, 0, ""
            while self._peek().startswith("."):
                token = self._next()
                if token == ".align":
                    align = self._integer()
                elif token[1:] in BYTES:
                    kind = token[1:]
                    size = BYTES[kind]
                elif token not in (".ptr", ".global", ".const", ".shared", ".local"):
                    raise self._error(f"unexpected {token!r} among the parameters of {function}")
                elif token == ".ptr":
                    # .ptr .space .align n describes what the pointer points at
                    while self._peek() in (".global", ".const", ".shared", ".local", ".align"):
                        if self._next() == ".align":
                            self._integer()
            name = self._next()
            count = 1
            if self._accept("["):
                count = self._integer()
                self._expect("]")
            found.append(Variable(name, "param", align or size, size * count, type=kind))
            self._accept(",")
        return found

    def _function(self, program: Program) -> None:
        is_kernel = self._next() == ".entry"
        returns = self._parameters("a function") if self._peek() == "(" else []
        name = self._next()
        function = Function(name, self._parameters(name), is_kernel, returns)
        while self._peek() not in ("{", ";"):
            token = self._next()
            if token in (".reqntid", ".maxntid"):
                size = [self._integer()]
                while self._accept(","):
                    size.append(self._integer())
                block = (*size, 1, 1)[:3]
                if token == ".reqntid":
                    function.required_block = block  # type: ignore[assignment]
                else:
                    function.max_block = block  # type: ignore[assignment]
            elif token in (".minnctapersm", ".maxnreg"):
                self._integer()
            elif token == ".pragma":
                self._next()
                self._accept(";")
            elif token != ".noreturn":
                raise self._error(f"unsupported directive {token!r} on {name}")
        if self._accept(";"):
            program.external.add(name)
            return
        self._next()
        scope = Scope(None, "")
        for variable in (*function.params, *function.returns):
            scope.symbols[variable.name] = variable.name
        self._body(function, scope)
        for index in scope.jumps:
            raise ParseError(f"line {function.code[index].line}: no such label: {function.code[index].text}")
        program.functions[name] = function
        program.external.discard(name)

    # Function bodies.

    def _body(self, function: Function, scope: Scope) -> None:
        while not self._accept("}"):
            token = self._peek()
            if not token:
                raise self._error(f"{function.name} is not closed")
            if token == "{":
                self._next()
                self._scopes += 1
                inner = Scope(scope, f"@{self._scopes}")
                self._body(function, inner)
                scope.jumps += inner.jumps
            elif token == ";":
                self._next()
            elif token == ".reg":
                self._registers(scope)
            elif token in (".shared", ".local", ".param"):
                for variable in self._variables():
                    scope.symbols[variable.name] = variable.name + scope.suffix
                    function.variables.append(
                        dataclasses.replace(variable, name=variable.name + scope.suffix)
                    )
            elif token in (".pragma", ".callprototype"):
                while self._next() != ";":
                    pass
            elif self._tokens[self._at + 1].text == ":":
                self._label(function, scope)
            else:
                self._instruction(function, scope)
        self._resolve(function, scope)

    def _label(self, function: Function, scope: Scope) -> None:
        name = self._next() + scope.suffix
        self._expect(":")
        scope.symbols[name.removesuffix(scope.suffix) if scope.suffix else name] = name
        if self._accept(".branchtargets"):
            targets = [self._next()]
            while self._accept(","):
                targets.append(self._next())
            self._expect(";")
            function.branch_targets[name] = tuple(target + scope.suffix for target in targets)
        else:
            function.labels[name] = len(function.code)

    def _registers(self, scope: Scope) -> None:
        self._next()
        kind = self._next()[1:]
        if kind not in BYTES:
            raise self._error(f"unknown register type .{kind}")
        while True:
            name = self._next()
            if self._accept("<"):
                names = [f"{name}{i}" for i in range(self._integer())]
                self._expect(">")
            else:
                names = [name]
            for each in names:
                scope.registers[each] = Register(each + scope.suffix, kind)
            if not self._accept(","):
                break
        self._expect(";")

    def _instruction(self, function: Function, scope: Scope) -> None:
        first = self._tokens[self._at]
        guard = None
        if self._accept("@"):
            negated = self._accept("!")
            register = scope.register(self._next())
            if register is None:
                raise self._error("unknown predicate")
            guard = (register, negated)
        opcode, *mods = self._next().split(".")
        operands = []
        while not self._accept(";"):
            operands.append(self._operand(scope))
            self._accept(",")
        text = self._text[first.start : self._tokens[self._at - 1].start]
        if opcode in ("bra", "brx"):
            scope.jumps.append(len(function.code))
        function.code.append(
            Instruction(opcode, tuple(mods), tuple(operands), guard, first.line, " ".join(text.split()))
        )

    def _resolve(self, function: Function, scope: Scope) -> None:
        """Bind the jumps of a scope that is complete to its labels; the others are left to its parent."""
        left = []
        for index in scope.jumps:
            instruction = function.code[index]
            *others, target = instruction.operands
            assert isinstance(target, Symbol)
            name = scope.symbols.get(target.name, target.name + scope.suffix)
            if name not in function.labels and name not in function.branch_targets:
                left.append(index)
                continue
            function.code[index] = dataclasses.replace(instruction, operands=(*others, Symbol(name)))
        scope.jumps = left
