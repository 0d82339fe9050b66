"""Atomics whose lanes meet in the same cells."""

import numpy as np
import pytest
import torch

X = np.random.default_rng(0).integers(0, 2**32, 256, np.uint32)
CELL = """
and.b32 %r1, %tid, 3;
mad.wide.u32 %rd2, %tid, 4, %rd0;
mad.wide.u32 %rd3, %r1, 4, %rd1;
ld.global.b32 %r0, [%rd2];
"""


@pytest.mark.parametrize(
    ("op", "function", "kind"),
    [("add.u32", np.add, "u4"), ("min.s32", np.minimum, "i4"), ("max.u32", np.maximum, "u4"),
     ("and.b32", np.bitwise_and, "u4"), ("or.b32", np.bitwise_or, "u4"), ("xor.b32", np.bitwise_xor, "u4")],
)  # fmt: skip
def test_reductions(kernel, op, function, kind):
    start = np.array([1, 2**31, 7, 2**32 - 1], np.uint32)
    expected = [function.reduce(np.append(X[i::4], start[i]).view(kind)) for i in range(4)]
    for text in (f"red.relaxed.gpu.global.{op} [%rd3], %r0;", f"atom.global.{op} %r5, [%rd3], %r0;"):
        y = start.copy()
        kernel(CELL + text, 2).launch(1, 256, [X, y])
        np.testing.assert_array_equal(y.view(kind), np.array(expected, kind))


def test_old_values_are_those_of_some_order(kernel):
    """A counter hands every thread of every block a number of its own."""
    run = kernel(
        """
        mov.u32 %r1, %ctaid.x;
        mad.lo.u32 %r1, %r1, 64, %tid;
        atom.add.u32 %r0, [%rd0], 1;
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        st.global.b32 [%rd2], %r0;
        """,
        2,
    )
    counter, got = np.zeros(1, np.uint32), np.zeros(256, np.uint32)
    run.launch(4, 64, [counter, got])
    assert counter[0] == 256
    np.testing.assert_array_equal(np.sort(got), np.arange(256))
    assert (got != np.arange(256)).any()


def test_compare_and_swap_takes_one_winner(kernel):
    run = kernel(
        """
        add.u32 %r2, %tid, 1;
        atom.global.cas.b32 %r0, [%rd0], 0, %r2;
        mad.wide.u32 %rd2, %tid, 4, %rd1;
        st.global.b32 [%rd2], %r0;
        """,
        2,
    )
    cell, got = np.zeros(1, np.uint32), np.zeros(64, np.uint32)
    run.launch(1, 64, [cell, got])
    assert (got == 0).sum() == 1
    winner = int(np.flatnonzero(got == 0)[0])
    assert cell[0] == winner + 1
    assert (np.delete(got, winner) == cell[0]).all()


@pytest.mark.parametrize(("op", "limit"), [("inc", 4), ("dec", 4)])
def test_wrapping_counters(kernel, op, limit):
    cell = np.array([2], np.uint32)
    kernel(f"atom.global.{op}.u32 %r0, [%rd0], {limit};", 1).launch(1, 13, [cell])
    value = 2
    for _ in range(13):
        value = (
            (0 if value >= limit else value + 1)
            if op == "inc"
            else (limit if value == 0 or value > limit else value - 1)
        )
    assert cell[0] == value


def test_float_sums(kernel):
    x = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    y = np.zeros(4, np.float32)
    kernel(CELL.replace("b32 %r0", "f32 %f0") + "atom.global.add.f32 %f1, [%rd3], %f0;", 2).launch(
        1, 256, [x, y]
    )
    np.testing.assert_allclose(y, [x[i::4].astype(np.float64).sum() for i in range(4)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "dtype"), [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
def test_packed_half_sums(kernel, kind, dtype):
    x = torch.randint(-4, 5, (256, 2), generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.zeros(4, 2, dtype=dtype)
    kernel(CELL + f"red.global.add.noftz.{kind} [%rd3], %r0;", 2).launch(1, 256, [x, y])
    # Small integers: every partial sum is exact.
    assert torch.equal(y.double(), torch.stack([x[i::4].double().sum(0) for i in range(4)]))


def test_shared_atomics(kernel):
    run = kernel(
        """
        mov.u32 %r3, buffer;
        setp.eq.u32 %p0, %tid, 0;
        @%p0 st.shared.b32 [%r3], 5;
        bar.sync 0;
        atom.shared.add.u32 %r0, [%r3], %tid;
        bar.sync 0;
        ld.shared.b32 %r1, [%r3];
        st.global.b32 [%rd0], %r1;
        """,
        1,
        registers=".shared .align 4 .b8 buffer[4];",
    )
    got = np.zeros(1, np.uint32)
    run.launch(1, 128, [got])
    assert got[0] == 5 + sum(range(128))
