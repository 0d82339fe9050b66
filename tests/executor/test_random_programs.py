"""Random structured programs, run lane by lane in Python and, with their blocks scattered over the text, as
PTX.
"""

import random

import numpy as np
import pytest

REGISTERS = 4
MASK = 0xFFFFFFFF
LANES = 64


class Program:
    """Statements: ("set", d, op, a, b), ("if", a, then, otherwise), ("loop", a, body), ("leave", a): leave
    the loop.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.statements = [self._statement(0, False) for _ in range(5)]
        self._labels = 0
        self._side_roads: list[str] = []

    def _statement(self, depth: int, in_loop: bool) -> tuple:
        r = self._random
        kind = r.random()
        if depth == 3 or kind < 0.35:
            op = r.choice(["add", "sub", "mul.lo", "xor", "and", "shr"])
            return ("set", r.randrange(REGISTERS), op, r.randrange(REGISTERS), r.randrange(REGISTERS))
        if kind < 0.65:
            return ("if", r.randrange(REGISTERS), self._block(depth, in_loop), self._block(depth, in_loop))
        if kind < 0.9 or not in_loop:
            return ("loop", r.randrange(REGISTERS), self._block(depth, True))
        return ("leave", r.randrange(REGISTERS))

    def _block(self, depth: int, in_loop: bool) -> list[tuple]:
        return [self._statement(depth + 1, in_loop) for _ in range(self._random.randint(1, 3))]

    # In Python, one lane.

    def run(self, statement: tuple, v: list[int]) -> bool:
        """Change the registers of a lane; whether the loop around is left."""
        if statement[0] == "set":
            _, d, op, a, b = statement
            x, y = v[a], v[b]
            results = {
                "add": x + y,
                "sub": x - y,
                "mul.lo": x * y,
                "xor": x ^ y,
                "and": x & y,
                "shr": x >> (y & 31),
            }
            v[d] = results[op] & MASK
        elif statement[0] == "if":
            return any(self.run(each, v) for each in (statement[2] if v[statement[1]] & 1 else statement[3]))
        elif statement[0] == "leave":
            return v[statement[1]] & 3 == 0
        else:
            for _ in range(v[statement[1]] & 3):
                if any(self.run(each, v) for each in statement[2]):
                    break
        return False

    # As PTX.

    def ptx(self) -> str:
        """Each statement, and a shuffle by one lane after it; then the blocks that lie off the road."""
        lines = []
        for statement in self.statements:
            lines += [self._emit(statement, None), "shfl.sync.bfly.b32 %r0, %r0, 1, 31, -1;"]
        road = "\n".join(lines) + "\nbra.uni END;\n"
        self._random.shuffle(self._side_roads)
        return road + "\n".join(self._side_roads) + "\nEND:"

    def _label(self) -> str:
        self._labels += 1
        return f"L{self._labels}"

    def _emit(self, statement: tuple, leave: str | None) -> str:
        if statement[0] == "set":
            _, d, op, a, b = statement
            if op == "shr":
                return f"and.b32 %r20, %r{b}, 31;\nshr.u32 %r{d}, %r{a}, %r20;"
            kind = "b32" if op in ("xor", "and") else "u32"
            return f"{op}.{kind} %r{d}, %r{a}, %r{b};"
        if statement[0] == "leave":
            return f"and.b32 %r20, %r{statement[1]}, 3;\nsetp.eq.u32 %p0, %r20, 0;\n@%p0 bra {leave};"
        if statement[0] == "if":
            side, join = self._label(), self._label()
            then, otherwise = (self._join(block, leave) for block in statement[2:])
            self._side_roads.append(f"{side}:\n{then}\nbra.uni {join};")
            test = f"and.b32 %r20, %r{statement[1]}, 1;\nsetp.ne.u32 %p0, %r20, 0;\n@%p0 bra {side};"
            return f"{test}\n{otherwise}\n{join}:"
        head, end = self._label(), self._label()
        counter = f"%r{20 + self._labels}"
        body = self._join(statement[2], end)
        return f"""and.b32 {counter}, %r{statement[1]}, 3;
        {head}:
        setp.eq.u32 %p0, {counter}, 0;
        @%p0 bra {end};
        sub.u32 {counter}, {counter}, 1;
        {body}
        bra.uni {head};
        {end}:"""

    def _join(self, block: list[tuple], leave: str | None) -> str:
        return "\n".join(self._emit(each, leave) for each in block)


@pytest.mark.parametrize("seed", range(25))
def test_random_programs(kernel, seed):
    program = Program(seed)
    start = np.random.default_rng(seed).integers(0, 2**32, (LANES, REGISTERS), np.uint32)
    loads = "mad.wide.u32 %rd2, %tid, 16, %rd0;\nld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd2];\n"
    store = "\nmad.wide.u32 %rd3, %tid, 16, %rd1;\nst.global.v4.b32 [%rd3], {%r0, %r1, %r2, %r3};"
    text = program.ptx()
    registers = "\n".join(f".reg .b32 %r{i};" for i in range(40, 200))
    got = np.zeros_like(start)
    kernel(loads + text + store, 2, registers=registers).launch(1, LANES, [start, got], seed=seed)
    lanes = [[int(v) for v in row] for row in start]
    for statement in program.statements:
        for lane in lanes:
            program.run(statement, lane)
        swapped = [lanes[i ^ 1][0] for i in range(LANES)]
        for lane, value in zip(lanes, swapped, strict=True):
            lane[0] = value
    np.testing.assert_array_equal(got, np.array(lanes, np.uint32))
