"""Cut a kernel into straight-line segments and order them for the scheduler.

Lanes of a warp that have diverged are run in the order of their segments: the earliest one first. So the
order decides where they meet again. It is a weak topological order (Bourdoncle 1993): a join comes after
all the ways to it, and what follows a loop comes after all of the loop.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UnsupportedInstruction
from .program import Function, Immediate, Instruction, Operand, Register, Symbol

BARRIERS = {"bar", "barrier"}
_EXITS = {"ret", "exit"}
_WARP_WIDE = {"mma", "ldmatrix", "stmatrix", "shfl", "vote", "match", "redux"}


@dataclass
class Segment:
    """Instructions that run one after the other without a jump.

    Attributes:
        body: what runs, the terminator left out.
        end: the jump, barrier or exit at its end; `None` to fall through.
        members: who has to be here before it may run: `None` for nobody else, -1 for all lanes of the warp
            that are still alive, or the register that holds the mask of them.
        next: index of the segment that follows in the text; the number of segments at the kernel's end.
        targets: where its jump goes.
    """

    body: list[Instruction]
    end: Instruction | None
    members: Register | int | None
    next: int
    targets: tuple[int, ...]

    @property
    def line(self) -> int:
        """Line of the PTX that it starts at."""
        return self.first.line

    @property
    def first(self) -> Instruction:
        first = self.body[0] if self.body else self.end
        assert first is not None
        return first

    @property
    def successors(self) -> list[int]:
        """All segments that may run next, the fall-through first."""
        end = self.end
        falls = end is None or end.guard is not None or end.opcode in BARRIERS
        return ([self.next] if falls else []) + list(self.targets)


def is_barrier(instruction: Instruction) -> bool:
    """A barrier of the block, not `bar.warp.sync`, which is one of the warp."""
    return instruction.opcode in BARRIERS and "warp" not in instruction.mods


def member_mask(instruction: Instruction) -> Operand | int:
    """The lanes that have to execute this instruction together: -1 for all, `None` for no such rule."""
    op, operands = instruction.opcode, instruction.operands
    if op == "bar" and "warp" in instruction.mods:
        return _mask(operands[0])
    if is_barrier(instruction):
        return -1
    if op not in _WARP_WIDE or "sync" not in instruction.mods:
        return None
    return -1 if op in ("mma", "ldmatrix", "stmatrix") else _mask(operands[-1])


def _mask(operand: Operand) -> Operand | int:
    if isinstance(operand, Immediate) and operand.value & 0xFFFFFFFF == 0xFFFFFFFF:
        return -1
    return operand


def _ends_segment(instruction: Instruction) -> bool:
    return instruction.opcode in ("bra", "brx", *_EXITS) or is_barrier(instruction)


def _constants(function: Function) -> dict[Register, int]:
    """Registers that are written once, by a `mov` of a number: masks such as -1 are kept in them."""
    written: dict[Register, int | None] = {}
    for instruction in function.code:
        for operand in instruction.operands[:1]:
            for register in getattr(operand, "items", (operand,)):
                if isinstance(register, Register):
                    value = instruction.operands[1] if instruction.opcode == "mov" else None
                    known = isinstance(value, Immediate) and not instruction.guard and register not in written
                    written[register] = value.value if known and isinstance(value, Immediate) else None
    return {register: value for register, value in written.items() if value is not None}


def segments(function: Function) -> list[Segment]:
    """The segments of a kernel in the order of the scheduler; segment 0 is where it starts."""
    code, constants = function.code, _constants(function)
    leaders = {0, *function.labels.values()}
    for index, instruction in enumerate(code):
        if _ends_segment(instruction):
            leaders.add(index + 1)
        mask = member_mask(instruction)
        if isinstance(mask, Register) and constants.get(mask, 0) & 0xFFFFFFFF != 0xFFFFFFFF:
            leaders.add(index)
    starts = sorted(start for start in leaders if start < len(code))
    position = {start: number for number, start in enumerate(starts)}
    cut: list[Segment] = []
    for number, start in enumerate(starts):
        stop = starts[number + 1] if number + 1 < len(starts) else len(code)
        body = code[start:stop]
        end = body[-1] if _ends_segment(body[-1]) else None
        masks = [member_mask(each) for each in body]
        masks = [
            -1 if isinstance(m, Register) and constants.get(m, 0) & 0xFFFFFFFF == 0xFFFFFFFF else m
            for m in masks
        ]
        targets = tuple(position.get(at, len(starts)) for at in _targets(function, end))
        cut.append(Segment(body[:-1] if end else body, end, _members(body, masks), number + 1, targets))
    return _reorder(cut)


def _members(body: list[Instruction], masks: list[Operand | int]) -> Register | int | None:
    if any(isinstance(mask, Immediate) for mask in masks):
        at = next(i for i, mask in enumerate(masks) if isinstance(mask, Immediate))
        raise UnsupportedInstruction(
            f"line {body[at].line}: a constant member mask other than -1: {body[at].text}"
        )
    if -1 in masks:
        return -1
    return masks[0] if masks and isinstance(masks[0], Register) else None


def _targets(function: Function, end: Instruction | None) -> list[int]:
    if end is None or end.opcode not in ("bra", "brx"):
        return []
    name = end.operands[-1]
    assert isinstance(name, Symbol)
    names = function.branch_targets[name.name] if end.opcode == "brx" else (name.name,)
    return [function.labels[each] for each in names]


def _reorder(cut: list[Segment]) -> list[Segment]:
    graph = [[s for s in segment.successors if s < len(cut)] for segment in cut]
    order = _weak_topological_order(graph, 0)
    order += sorted(set(range(len(cut))) - set(order))  # never reached
    place = {old: new for new, old in enumerate(order)} | {len(cut): len(cut)}
    for segment in cut:
        segment.next = place[segment.next]
        segment.targets = tuple(place[target] for target in segment.targets)
    return [cut[old] for old in order]


def _weak_topological_order(graph: list[list[int]], root: int) -> list[int]:
    def visit(nodes: set[int], head: int) -> list[int]:
        order: list[int] = []
        for component in _components(graph, nodes, head):
            first = component[0]
            order.append(first)
            if len(component) > 1:
                rest = set(component[1:])
                while rest:
                    # Entries of the loop's body: after its head has gone, each may start a part of its own.
                    entry = next((s for s in graph[first] if s in rest), min(rest))
                    inside = visit(rest, entry)
                    order += inside
                    rest -= set(inside)
        return order

    return visit(set(range(len(graph))), root)


def _components(graph: list[list[int]], nodes: set[int], root: int) -> list[list[int]]:
    """Strongly connected components reachable from `root` within `nodes`, in topological order (Tarjan).

    Each has the node first by which it was entered.
    """
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    work = [(root, iter(graph[root]))]
    index[root] = low[root] = 0
    stack.append(root)
    on_stack.add(root)
    while work:
        node, successors = work[-1]
        for successor in successors:
            if successor not in nodes:
                continue
            if successor not in index:
                index[successor] = low[successor] = len(index)
                stack.append(successor)
                on_stack.add(successor)
                work.append((successor, iter(graph[successor])))
                break
            if successor in on_stack:
                low[node] = min(low[node], index[successor])
        else:
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == index[node]:
                at = stack.index(node)
                component, stack[at:] = stack[at:], []
                on_stack -= set(component)
                found.append(component)
    return found[::-1]
