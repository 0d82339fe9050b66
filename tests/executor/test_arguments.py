"""What a kernel is given: structs, numbers, and arrays that hold nothing yet."""

import numpy as np
import pytest
import torch

from ptx_executor import LaunchError, poison


def test_a_struct_is_laid_out_as_in_c(kernel):
    run = kernel(
        """
        ld.param.u64 %rd1, [s];
        ld.param.u8 %h0, [s+8];
        ld.param.f32 %f0, [s+12];
        ld.param.v2.u32 {%r0, %r1}, [s+16];
        ld.param.f64 %fd0, [s+24];
        cvt.u32.u16 %r2, %h0;
        st.global.b32 [%rd1], %r2;
        st.global.f32 [%rd1+4], %f0;
        st.global.v2.b32 [%rd1+8], {%r0, %r1};
        st.global.f64 [%rd1+16], %fd0;
        """,
        0,
        parameters=".param .align 8 .b8 s[32]",
    )
    y = np.zeros(24, np.uint8)
    run.launch(1, 1, [(y, np.uint8(7), 1.5, 3, (np.int32(-4),), np.float64(0.1))])
    assert y[:4].view(np.uint32)[0] == 7
    assert y[4:8].view(np.float32)[0] == 1.5
    assert y[8:16].view(np.int32).tolist() == [3, -4]
    assert y[16:].view(np.float64)[0] == 0.1


def test_a_struct_has_all_of_its_fields(kernel):
    parameters = ".param .align 8 .b8 s[24]"
    run = kernel("ld.param.f32 %f0, [s+12];\nst.global.f32 [%rd0], %f0;", 1, parameters=parameters)
    y = np.zeros(1, np.float32)
    run.launch(1, 1, [y, (y, 1, 2.5, 3)])  # padded at its end
    assert y[0] == 2.5
    for fields in ((y, 1), (y, 1, 2.5, 3, 4, 5, 6)):
        with pytest.raises(LaunchError, match=r"argument 1: s has 24 bytes, got (16|32) bytes"):
            run.launch(1, 1, [y, fields])


@pytest.mark.parametrize(("kind", "register"), [("f32", "%f0"), ("f64", "%fd0")])
def test_pythons_integers_are_numbers_where_a_float_is_expected(kernel, kind, register):
    body = f"ld.param.{kind} {register}, [x];\nst.global.{kind} [%rd0], {register};"
    run = kernel(body, 1, parameters=f".param .{kind} x")
    y = np.zeros(1, f"f{int(kind[1:]) // 8}")
    for value in (2, 2.0, y.dtype.type(2), True):
        run.launch(1, 1, [y, value])
        assert y[0] == float(value)


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_a_float_is_no_integer(kernel, kind):
    run = kernel("ld.param.b32 %r0, [n];\nst.global.b32 [%rd0], %r0;", 1, parameters=f".param .{kind} n")
    y = np.zeros(1, np.int32)
    with pytest.raises(
        LaunchError, match=f"argument 1: n is an integer of type .{kind}, got the float 100.0"
    ):
        run.launch(1, 1, [y, 100.0])
    run.launch(1, 1, [y, 100])
    assert y[0] == 100


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 6), np.float32)[:, ::2],
        np.zeros(3, np.float16),
        np.zeros((), np.float64),
        np.zeros(2, np.complex128),
        torch.zeros(4, 6).T,
        torch.zeros(3, dtype=torch.bfloat16),
    ],
)
def test_poison_is_not_a_number(array):
    assert poison(array) is array
    assert (array != array).all()


def test_poison_of_integers_and_of_what_is_neither():
    assert poison(np.zeros(3, np.int16)).tolist() == poison(torch.zeros(3, dtype=torch.int64)).tolist()
    with pytest.raises(TypeError, match="expected an array or a tensor, got list"):
        poison([1.0])


def test_parameters_may_be_read_by_address(kernel):
    run = kernel(
        """
        mov.b64 %rd1, table;
        cvta.param.u64 %rd1, %rd1;
        mad.wide.u32 %rd1, %tid, 4, %rd1;
        ld.b32 %r0, [%rd1];
        mad.wide.u32 %rd2, %tid, 4, %rd0;
        st.global.b32 [%rd2], %r0;
        """,
        1,
        parameters=".param .align 4 .b8 table[16]",
    )
    y = np.zeros(4, np.int32)
    run.launch(1, 4, [y, (5, 6, 7, 8)])
    assert y.tolist() == [5, 6, 7, 8]
