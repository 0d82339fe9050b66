"""Jumps, divergence, barriers, calls, and the ways in which threads get stuck."""

import numpy as np
import pytest

from ptx_executor import BarrierError, DeviceAssertion, ExecutionTimeout, Module

STORE = "mad.wide.u32 %rd1, %tid, 4, %rd0;\nst.global.b32 [%rd1], %r0;"


def _collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n = 3 * n + 1 if n % 2 else n // 2
        steps += 1
    return steps


def test_loops_and_branches_diverge(kernel):
    run = kernel(
        f"""
        mov.u32 %r0, 0;
        add.u32 %r1, %tid, 1;
        LOOP:
        setp.eq.u32 %p0, %r1, 1;
        @%p0 bra DONE;
        and.b32 %r2, %r1, 1;
        setp.eq.u32 %p1, %r2, 0;
        @%p1 bra EVEN;
        mad.lo.u32 %r1, %r1, 3, 1;
        bra.uni NEXT;
        EVEN:
        shr.u32 %r1, %r1, 1;
        NEXT:
        add.u32 %r0, %r0, 1;
        bra.uni LOOP;
        DONE:
        {STORE}
        """,
        1,
    )
    got = np.zeros(200, np.int32)
    run.launch(1, 200, [got])
    assert got.tolist() == [_collatz(i + 1) for i in range(200)]


def test_lanes_meet_again_before_a_shuffle(kernel):
    """The side road lies behind the join in the text; the join has to wait for it all the same."""
    run = kernel(
        f"""
        and.b32 %r1, %tid, 3;
        setp.eq.u32 %p0, %r1, 0;
        mov.u32 %r0, %tid;
        @%p0 bra SIDE;
        JOIN:
        shfl.sync.bfly.b32 %r0, %r0, 1, 31, -1;
        {STORE}
        ret;
        SIDE:
        add.u32 %r0, %r0, 1000;
        bra.uni JOIN;
        """,
        1,
    )
    got = np.zeros(64, np.int32)
    run.launch(1, 64, [got])
    values = np.arange(64) + np.where(np.arange(64) % 4 == 0, 1000, 0)
    np.testing.assert_array_equal(got, values[np.arange(64) ^ 1])


def test_shuffle_among_members_only(kernel):
    """Half of a warp never comes, and is not in the mask."""
    run = kernel(
        f"""
        mov.u32 %r0, %tid;
        setp.ge.u32 %p0, %tid, 16;
        @%p0 bra END;
        activemask.b32 %r2;
        shfl.sync.down.b32 %r0, %r0, 1, 31, %r2;
        END:
        {STORE}
        """,
        1,
    )
    got = np.zeros(32, np.int32)
    run.launch(1, 32, [got])
    assert got[:15].tolist() == list(range(1, 16))
    assert got[15] == -1  # from a lane that does not take part: nothing sensible
    assert got[16:].tolist() == list(range(16, 32))


def test_a_shuffle_that_half_of_its_members_never_reach(kernel):
    run = kernel(
        f"""
        mov.u32 %r0, %tid;
        setp.ge.u32 %p0, %tid, 16;
        @%p0 bra WAIT;
        shfl.sync.down.b32 %r0, %r0, 1, 31, -1;
        WAIT:
        bar.sync 0;
        {STORE}
        """,
        1,
    )
    with pytest.raises(BarrierError, match=r"deadlock.*a part of warp 0"):
        run.launch(1, 32, [np.zeros(32, np.int32)])


def test_indexed_branch(kernel):
    run = kernel(
        f"""
        and.b32 %r1, %tid, 3;
        TABLE: .branchtargets A, B, C, B;
        brx.idx %r1, TABLE;
        A: mov.u32 %r0, 10; bra.uni END;
        B: mov.u32 %r0, 20; bra.uni END;
        C: mov.u32 %r0, 30;
        END:
        {STORE}
        """,
        1,
    )
    got = np.zeros(64, np.int32)
    run.launch(1, 64, [got])
    assert got.tolist() == [10, 20, 30, 20] * 16


def test_scopes_of_inline_assembly(kernel):
    """Two blocks declare the same register and label."""
    block = """{
        .reg .pred p;
        .reg .b32 t;
        setp.lt.u32 p, %tid, LIMIT;
        mov.b32 t, 0;
        @!p bra skip;
        mov.b32 t, 1;
        skip:
        add.u32 %r0, %r0, t;
        }"""
    run = kernel(
        f"mov.b32 %r0, 0;\n{block.replace('LIMIT', '8')}\n{block.replace('LIMIT', '20')}\n{STORE}", 1
    )
    got = np.zeros(32, np.int32)
    run.launch(1, 32, [got])
    np.testing.assert_array_equal(got, (np.arange(32) < 8).astype(int) + (np.arange(32) < 20))


def test_ragged_blocks_and_early_exit(kernel):
    run = kernel(
        f"""
        setp.ge.u32 %p0, %tid, 37;
        @%p0 exit;
        mov.u32 %r0, %tid;
        {STORE}
        """,
        1,
    )
    got = np.full(50, -1, np.int32)
    run.launch(1, 50, [got])
    np.testing.assert_array_equal(got, np.where(np.arange(50) < 37, np.arange(50), -1))


@pytest.mark.parametrize("seed", range(4))
def test_barriers_order_shared_memory(kernel, seed):
    run = kernel(
        f"""
        mov.u32 %r5, buffer;
        mad.lo.u32 %r1, %tid, 4, %r5;
        mov.u32 %r0, %tid;
        mov.u32 %r2, 0;
        LOOP:
        st.shared.b32 [%r1], %r0;
        bar.sync 0;
        xor.b32 %r3, %tid, 64;
        mad.lo.u32 %r3, %r3, 4, %r5;
        ld.shared.b32 %r0, [%r3];
        add.u32 %r0, %r0, 1;
        barrier.sync.aligned 1, 128;
        add.u32 %r2, %r2, 1;
        setp.lt.u32 %p0, %r2, 3;
        @%p0 bra LOOP;
        {STORE}
        """,
        1,
        registers=".shared .align 4 .b8 buffer[512];",
    )
    got = np.zeros(128, np.int32)
    report = run.launch(3, 128, [got], seed=seed)
    np.testing.assert_array_equal(got, (np.arange(128) ^ 64) + 3)
    assert report.barriers == 3 * 6


def test_producer_arrives_consumer_waits(kernel):
    """bar.arrive of warp 1 lets warp 0 continue; warp 1 does not wait."""
    run = kernel(
        f"""
        setp.ge.u32 %p0, %tid, 32;
        mov.u32 %r5, buffer;
        @%p0 bra PRODUCER;
        bar.sync 2, 64;
        mad.lo.u32 %r1, %tid, 4, %r5;
        ld.shared.b32 %r0, [%r1];
        {STORE}
        ret;
        PRODUCER:
        mad.lo.u32 %r1, %tid, 4, %r5;
        st.shared.b32 [%r1+-128], %tid;
        bar.arrive 2, 64;
        ret;
        """,
        1,
        registers=".shared .align 4 .b8 buffer[128];",
    )
    got = np.zeros(32, np.int32)
    for seed in range(4):
        run.launch(1, 64, [got], seed=seed)
        np.testing.assert_array_equal(got, np.arange(32, 64))


def test_barriers_that_count(kernel):
    run = kernel(
        f"""
        setp.lt.u32 %p0, %tid, 70;
        bar.red.popc.u32 %r0, 0, %p0;
        bar.red.and.pred %p1, 0, %p0;
        bar.red.or.pred %p2, 0, !%p0;
        selp.b32 %r1, 1000, 0, %p1;
        selp.b32 %r2, 2000, 0, %p2;
        add.u32 %r0, %r0, %r1;
        add.u32 %r0, %r0, %r2;
        {STORE}
        """,
        1,
    )
    got = np.zeros(96, np.int32)
    run.launch(1, 96, [got])
    assert got.tolist() == [2070] * 96


def test_barrier_that_a_warp_never_reaches(kernel):
    run = kernel("setp.ge.u32 %p0, %tid, 32;\n@%p0 exit;\nbar.sync 0;", 0)
    with pytest.raises(
        BarrierError, match=r"deadlock, waiting: warp 0 of block 0 at line \d+; 32 threads have ended"
    ):
        run.launch(1, 64, [])


def test_barrier_in_one_branch_of_a_warp(kernel):
    run = kernel("setp.lt.u32 %p0, %tid, 16;\n@%p0 bra A;\nbar.sync 0;\nret;\nA:\nbar.sync 0;", 0)
    with pytest.raises(BarrierError, match="deadlock"):
        run.launch(1, 32, [])


def test_barrier_reached_at_different_places(kernel):
    run = kernel("setp.lt.u32 %p0, %tid, 32;\n@%p0 bra A;\nbar.sync 0;\nret;\nA:\nbar.sync 0;", 0)
    with pytest.raises(BarrierError, match=r"divergent barrier 0: .* at lines"):
        run.launch(1, 64, [])


def test_endless_loop(kernel):
    with pytest.raises(ExecutionTimeout, match="out of time in the code from line"):
        kernel("LOOP:\nbra.uni LOOP;", 0).launch(1, 32, [], time_limit=0.1)


def test_spinning_lanes_let_the_others_go_on(kernel):
    """Lanes of one warp take a lock one after the other: the earliest code must not run indefinitely."""
    run = kernel(
        """
        SPIN:
        atom.global.cas.b32 %r1, [%rd0], 0, 1;
        setp.ne.u32 %p0, %r1, 0;
        @%p0 bra SPIN;
        ld.global.b32 %r2, [%rd0+4];
        add.u32 %r2, %r2, 1;
        st.global.b32 [%rd0+4], %r2;
        membar.gl;
        atom.global.exch.b32 %r3, [%rd0], 0;
        """,
        1,
    )
    counter = np.zeros(2, np.int32)
    run.launch(2, 20, [counter])
    assert counter.tolist() == [0, 40]


def test_trap(kernel):
    run = kernel("setp.eq.u32 %p0, %tid, 5;\n@%p0 trap;", 0)
    with pytest.raises(DeviceAssertion, match=r"thread \(5, 0, 0\)"):
        run.launch(1, 32, [])
    run.launch(1, 5, [])


def test_device_functions():
    module = Module.from_ptx(
        """
        .version 8.7
        .target sm_80
        .address_size 64
        .func (.param .b32 result) triple(.param .b32 x, .param .b32 limit)
        {
            .reg .b32 %r<4>; .reg .pred %p<2>;
            ld.param.b32 %r0, [x];
            ld.param.b32 %r1, [limit];
            setp.lt.u32 %p0, %r0, %r1;
            @%p0 bra SMALL;
            st.param.b32 [result+0], %r0;
            ret;
            SMALL:
            mul.lo.u32 %r0, %r0, 3;
            st.param.b32 [result+0], %r0;
            ret;
        }
        .visible .entry test(.param .u64 out)
        {
            .reg .b32 %r<4>; .reg .b64 %rd<2>;
            mov.u32 %r0, %tid.x;
            { .param .b32 p0; st.param.b32 [p0+0], %r0; .param .b32 p1; st.param.b32 [p1+0], 10;
              .param .b32 back; call.uni (back), triple, (p0, p1); ld.param.b32 %r1, [back+0]; }
            { .param .b32 p0; st.param.b32 [p0+0], %r1; .param .b32 p1; st.param.b32 [p1+0], 5;
              .param .b32 back; call.uni (back), triple, (p0, p1); ld.param.b32 %r1, [back+0]; }
            ld.param.u64 %rd0, [out];
            mad.wide.u32 %rd0, %r0, 4, %rd0;
            st.global.b32 [%rd0], %r1;
            ret;
        }
        """
    )
    got = np.zeros(40, np.int32)
    module["test"].launch(1, 40, [got])
    once = np.where(np.arange(40) < 10, np.arange(40) * 3, np.arange(40))
    np.testing.assert_array_equal(got, np.where(once < 5, once * 3, once))


def test_the_same_seed_gives_the_same_result(kernel):
    """Sums of floats depend on the order of their atomics."""
    run = kernel("cvt.rn.f32.u32 %f0, %tid;\nex2.approx.f32 %f0, %f0;\nred.global.add.f32 [%rd0], %f0;", 1)

    def total(seed: int) -> float:
        y = np.zeros(1, np.float32)
        run.launch(8, 64, [y], seed=seed)
        return float(y[0])

    assert total(1) == total(1)
    assert len({total(seed) for seed in range(6)}) > 1
