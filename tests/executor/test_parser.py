"""What is read, and what is refused with the line named."""

import pytest

from ptx_executor import Module, ParseError, UnsupportedInstruction
from ptx_executor.__main__ import main
from ptx_executor.parser import parse
from ptx_executor.program import Address, Immediate, Register, Special, Symbol, Vector

HEAD = ".version 8.7\n.target sm_80, debug\n.address_size 64\n"


def _instructions(body: str) -> list:
    text = (
        HEAD
        + ".visible .entry k() {\n.reg .b32 %r<9>;\n.reg .b64 %rd<9>;\n.reg .pred %p<3>;\n"
        + body
        + "\n}"
    )
    return parse(text).functions["k"].code


def test_operands():
    (load, move, shuffle) = _instructions(
        """
        @!%p1 ld.global.v2.b32 { %r0, %r1 }, [ %rd2 + -8 ]; // a comment; with a semicolon
        mov.b32 %r1, 0f3F800000; /* another
        one */ shfl.sync.bfly.b32 %r2|%p2, %r1, 0x1f, -1, 0xffffffffU;
        """
    )
    assert load.guard == (Register("%p1", "pred"), True)
    assert (load.opcode, load.mods) == ("ld", ("global", "v2", "b32"))
    assert load.operands == (
        Vector((Register("%r0", "b32"), Register("%r1", "b32"))),
        Address(Register("%rd2", "b64"), -8),
    )
    assert move.operands[1] == Immediate(0x3F800000, 4)
    assert shuffle.operands[0] == Vector((Register("%r2", "b32"), Register("%p2", "pred")))
    assert shuffle.operands[2:] == (Immediate(31), Immediate(-1), Immediate(0xFFFFFFFF))
    assert (load.line, move.line, shuffle.line) == (9, 10, 11)


def test_symbols_and_special_registers():
    (move, special) = _instructions("mov.u64 %rd0, table+16;\nmov.u32 %r0, %ctaid.y;")
    assert move.operands[1] == Symbol("table", 16)
    assert special.operands[1] == Special("ctaid.y")


def test_directives_and_debug_information():
    program = parse(
        HEAD
        + """
        .file 1 "/somewhere/source.cu"
        .extern .shared .align 16 .b8 dynamic[];
        .global .align 4 .b8 text[6] = {104, 105, 0};
        .const .align 8 .f64 numbers[2] = {0d3FF0000000000000, 0d4000000000000000};
        .visible .entry k(
            .param .u64 .ptr .global .align 16 k_param_0,
            .param .align 8 .b8 k_param_1[24]
        )
        .maxntid 128, 1, 1
        .reqntid 64
        .minnctapersm 2
        {
        .loc 1 3 0, function_name $L__info, inlined_at 1 4 5
        .pragma "nounroll";
        ret;
        }
        .section .debug_str { .b8 97 .b8 0 }
        """
    )
    kernel = program.functions["k"]
    assert (program.version, program.target) == ("8.7", "sm_80")
    assert [(p.name, p.size, p.align) for p in kernel.params] == [("k_param_0", 8, 8), ("k_param_1", 24, 8)]
    assert (kernel.required_block, kernel.max_block) == ((64, 1, 1), (128, 1, 1))
    assert [v.size for v in program.variables] == [None, 6, 16]
    assert program.variables[1].init == ((0, 104, 1), (1, 105, 1), (2, 0, 1))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mov.b32 %r0, 1", "line 9: unexpected '}'"),
        ("bra NOWHERE;", "line 8: no such label: bra NOWHERE"),
        ("mov.b32 %r0, ?;", "line 8: unexpected character '?'"),
        (".reg .b33 x;", "line 8: unknown register type .b33"),
        ("ld.global.b32 %r0, [%rd0;", "line 8: expected ']'"),
    ],
)
def test_errors_name_the_line(body, message):
    with pytest.raises(ParseError) as caught:
        _instructions(body)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("instruction", "why"),
    [
        ("wgmma.fence.sync.aligned;", "unknown opcode wgmma"),
        ("add.rn.cluster.f32 %f0, %f0, %f0;", "unknown modifier .cluster"),
        ("add.sat.u32.x %r0, %r0, %r0;", "it ends in no known type"),
        ("cp.async.bulk.shared.global [%r0], [%rd0], 16;", "unknown modifier .bulk|the size of a copy"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%f0}, {%f0}, {%f0}, {%f0};", "no such shape"),
        ("add.u32 %h0, %r0, %r0;", "%h0 is narrower than .u32"),
        ("mov.u32 %r0, missing;", "unknown variable missing"),
        ("mov.u32 %r0, %cluster_ctaid.x;", "unknown special register %cluster_ctaid.x"),
        ("shfl.sync.idx.b32 %r0, %r1, 0, 31, 0x3;", "a constant member mask"),
    ],
)
def test_what_is_not_implemented_is_an_error_with_its_line(kernel, instruction, why):
    with pytest.raises(UnsupportedInstruction, match=rf"line \d+.*({why})"):
        kernel(instruction, 0).check()


def test_recursion_is_refused():
    text = HEAD + ".func f() { call.uni f; ret; }\n.visible .entry k() { call.uni f; ret; }"
    with pytest.raises(UnsupportedInstruction, match="recursive"):
        Module.from_ptx(text)


def test_listing(tmp_path, capsys):
    good = tmp_path / "good.ptx"
    good.write_text(
        HEAD + ".visible .entry k(.param .u64 a) { .reg .b32 %r<2>; add.u32 %r0, %r1, 1; bar.sync 0; ret; }"
    )
    assert main([str(good)]) == 0
    listing = capsys.readouterr().out
    assert "version 8.7, target sm_80" in listing
    assert "instructions         3" in listing
    assert "barriers and warps        1  (bar 1)" in listing
    bad = tmp_path / "bad.ptx"
    bad.write_text(HEAD + ".visible .entry k() { wgmma.fence; ret; }")
    assert main([str(bad), str(tmp_path / "none.ptx")]) == 1
    captured = capsys.readouterr()
    assert "can't be executed: line 4: unknown opcode wgmma" in captured.out
    assert "none.ptx" in captured.err
