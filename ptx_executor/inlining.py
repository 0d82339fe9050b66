"""Put the device functions that a kernel calls into its own code.

nvcc passes arguments and results in variables of the `.param` space of the caller; these are local memory
here, and the callee's parameters become other names of them. Recursion and calls through pointers are not
supported.
"""

from __future__ import annotations

import dataclasses

from .errors import UnsupportedInstruction
from .program import (
    Address,
    Function,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Program,
    Register,
    Symbol,
    Variable,
    Vector,
)

_DEPTH = 32


def inline_calls(function: Function, program: Program) -> Function:
    """A copy of `function` without calls of functions that the module defines.

    Raises:
        UnsupportedInstruction: for recursion, and for arguments that are not variables of the caller.
    """
    for _ in range(_DEPTH):
        if not any(_callee(instruction, program) for instruction in function.code):
            return function
        function = _inline_once(function, program)
    raise UnsupportedInstruction(f"{function.name}: calls are nested more than {_DEPTH} deep, or recursive")


def _callee(instruction: Instruction, program: Program) -> Function | None:
    if instruction.opcode != "call":
        return None
    names = [operand.name for operand in instruction.operands if isinstance(operand, Symbol)]
    return program.functions.get(names[0]) if names else None


def _inline_once(function: Function, program: Program) -> Function:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    variables = list(function.variables)
    branch_targets = dict(function.branch_targets)
    at_label: dict[int, list[str]] = {}
    for label, index in function.labels.items():
        at_label.setdefault(index, []).append(label)
    for index, instruction in enumerate(function.code):
        labels |= dict.fromkeys(at_label.get(index, ()), len(code))
        callee = _callee(instruction, program)
        if callee is None:
            code.append(instruction)
            continue
        copy = _Copy(callee, instruction, f"#{len(code)}")
        if instruction.guard is not None:
            register, negated = instruction.guard
            skip = Instruction(
                "bra", (), (Symbol(copy.end),), (register, not negated), instruction.line, instruction.text
            )
            code.append(skip)
        start = len(code)
        code += [copy.instruction(each) for each in callee.code]
        labels |= {copy.label(label): start + position for label, position in callee.labels.items()}
        labels[copy.end] = len(code)
        branch_targets |= {
            copy.label(table): tuple(copy.label(target) for target in targets)
            for table, targets in callee.branch_targets.items()
        }
        known = {variable.name for variable in variables}
        variables += [variable for variable in copy.variables() if variable.name not in known]
    labels |= dict.fromkeys(at_label.get(len(function.code), ()), len(code))
    return dataclasses.replace(
        function, code=code, labels=labels, variables=variables, branch_targets=branch_targets
    )


class _Copy:
    """One call: the callee with names of its own."""

    def __init__(self, callee: Function, call: Instruction, suffix: str) -> None:
        self._callee, self._suffix = callee, suffix
        self.end = f"end of {callee.name}{suffix}"
        lists = [operand.items for operand in call.operands if isinstance(operand, Vector)]
        formal = ([callee.returns] if callee.returns else []) + ([callee.params] if callee.params else [])
        self._names: dict[str, Symbol] = {}
        if [len(actual) for actual in lists] != [len(each) for each in formal]:
            raise UnsupportedInstruction(
                f"line {call.line}: the arguments do not fit {callee.name}: {call.text}"
            )
        for actual, parameters in zip(lists, formal, strict=True):
            for operand, parameter in zip(actual, parameters, strict=True):
                if not isinstance(operand, Symbol):
                    raise UnsupportedInstruction(f"line {call.line}: an argument in a register: {call.text}")
                self._names[parameter.name] = operand
        for variable in callee.variables:
            if variable.space != "shared":
                self._names[variable.name] = Symbol(variable.name + suffix)

    def label(self, name: str) -> str:
        return name + self._suffix

    def variables(self) -> list[Variable]:
        """New local variables for this call; shared ones belong to the function and stay."""
        return [
            variable
            if variable.space == "shared"
            else dataclasses.replace(variable, name=variable.name + self._suffix)
            for variable in self._callee.variables
        ]

    def instruction(self, instruction: Instruction) -> Instruction:
        guard = instruction.guard and (self._register(instruction.guard[0]), instruction.guard[1])
        if instruction.opcode == "ret":
            return dataclasses.replace(
                instruction, opcode="bra", mods=(), operands=(Symbol(self.end),), guard=guard
            )
        operands = tuple(self._operand(operand) for operand in instruction.operands)
        return dataclasses.replace(instruction, operands=operands, guard=guard)

    def _register(self, register: Register) -> Register:
        return Register(register.name + self._suffix, register.type)

    def _operand(self, operand: Operand) -> Operand:
        if isinstance(operand, Register):
            return self._register(operand)
        if isinstance(operand, Negated):
            return Negated(self._register(operand.register))
        if isinstance(operand, Vector):
            return Vector(tuple(self._operand(item) for item in operand.items))
        if isinstance(operand, Address):
            base = self._operand(operand.base)
            if isinstance(base, Symbol):
                return Address(Symbol(base.name), operand.offset + base.offset)
            assert isinstance(base, Register | Immediate)
            return Address(base, operand.offset)
        if isinstance(operand, Symbol):
            if operand.name in self._callee.labels or operand.name in self._callee.branch_targets:
                return Symbol(self.label(operand.name))
            renamed = self._names.get(operand.name)
            return operand if renamed is None else Symbol(renamed.name, renamed.offset + operand.offset)
        return operand
