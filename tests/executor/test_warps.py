"""Instructions between the lanes of a warp against plain loops over lanes."""

import numpy as np
import pytest

LANES = np.arange(96)


def _by_warp(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, 32)


@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
def test_shuffle(kernel, mode, width):
    clamp = 0 if mode == "up" else 31
    control = (32 - width) << 8 | clamp
    run = kernel(
        f"""
        mad.wide.u32 %rd3, %tid, 4, %rd0;
        mad.wide.u32 %rd4, %tid, 4, %rd1;
        mad.wide.u32 %rd5, %tid, 4, %rd2;
        ld.global.b32 %r0, [%rd3];
        ld.global.b32 %r1, [%rd4];
        shfl.sync.{mode}.b32 %r2|%p1, %r0, %r1, {control}, -1;
        selp.b32 %r3, 0, 1, %p1;
        add.u32 %r2, %r2, %r3;
        st.global.b32 [%rd5], %r2;
        """,
        3,
    )
    rng = np.random.default_rng(0)
    value = rng.integers(0, 1000, 96, np.uint32) * 2
    by = rng.integers(0, 32, 96, np.uint32)
    got = np.zeros(96, np.uint32)
    run.launch(1, 96, [value, by, got])
    for i in range(96):
        lane, start = i % 32, i % 32 // width * width
        source = {
            "idx": start | int(by[i]) % width,
            "up": lane - int(by[i]),
            "down": lane + int(by[i]),
            "bfly": lane ^ int(by[i]),
        }
        j = source[mode]
        good = j >= start if mode == "up" else j < start + width
        assert got[i] == (value[i // 32 * 32 + j] if good else value[i] + 1)


def test_votes(kernel):
    run = kernel(
        """
        mad.wide.u32 %rd2, %tid, 4, %rd0;
        ld.global.b32 %r0, [%rd2];
        setp.ne.u32 %p1, %r0, 0;
        vote.sync.ballot.b32 %r1, %p1, -1;
        vote.sync.any.pred %p2, %p1, -1;
        vote.sync.all.pred %p3, %p1, -1;
        vote.sync.uni.pred %p4, !%p1, -1;
        selp.b32 %r2, 1, 0, %p2;
        selp.b32 %r3, 2, 0, %p3;
        selp.b32 %r4, 4, 0, %p4;
        or.b32 %r2, %r2, %r3;
        or.b32 %r2, %r2, %r4;
        mad.wide.u32 %rd3, %tid, 8, %rd1;
        st.global.v2.b32 [%rd3], {%r1, %r2};
        """,
        2,
    )
    x = np.random.default_rng(0).integers(0, 2, 96, np.int32)
    x[32:64], x[64:] = 1, 0
    got = np.zeros((96, 2), np.uint32)
    run.launch(1, 96, [x, got])
    for i in range(96):
        votes = _by_warp(x)[i // 32]
        assert got[i, 0] == sum(int(v) << j for j, v in enumerate(votes))
        assert got[i, 1] == votes.any() * 1 + votes.all() * 2 + (votes.all() or not votes.any()) * 4


@pytest.mark.parametrize(
    ("op", "function"),
    [("add.s32", np.add), ("min.s32", np.minimum), ("max.u32", np.maximum), ("and.b32", np.bitwise_and),
     ("or.b32", np.bitwise_or), ("xor.b32", np.bitwise_xor)],
)  # fmt: skip
def test_reductions_of_members(kernel, op, function):
    # Lanes work with those of their own parity.
    run = kernel(
        f"""
        mad.wide.u32 %rd2, %tid, 4, %rd0;
        mad.wide.u32 %rd3, %tid, 4, %rd1;
        ld.global.b32 %r0, [%rd2];
        and.b32 %r1, %tid, 1;
        shl.b32 %r2, 0x55555555, %r1;
        redux.sync.{op} %r3, %r0, %r2;
        st.global.b32 [%rd3], %r3;
        """,
        2,
    )
    kind = np.int32 if ".s32" in op else np.uint32
    x = np.random.default_rng(0).integers(0, 2**32, 96, np.uint32)
    got = np.zeros(96, np.uint32)
    run.launch(1, 96, [x, got])
    for i in range(96):
        members = _by_warp(x)[i // 32][i % 2 :: 2].view(kind)
        assert got.view(kind)[i] == function.reduce(members, dtype=kind)


def test_match(kernel):
    run = kernel(
        """
        mad.wide.u32 %rd2, %tid, 4, %rd0;
        mad.wide.u32 %rd3, %tid, 8, %rd1;
        ld.global.b32 %r0, [%rd2];
        match.any.sync.b32 %r1, %r0, -1;
        match.all.sync.b32 %r2|%p1, %r0, -1;
        st.global.v2.b32 [%rd3], {%r1, %r2};
        """,
        2,
    )
    x = np.random.default_rng(0).integers(0, 4, 64, np.uint32)
    x[32:] = 7
    got = np.zeros((64, 2), np.uint32)
    run.launch(1, 64, [x, got])
    for i in range(64):
        votes = _by_warp(x)[i // 32] == x[i]
        assert got[i, 0] == sum(int(v) << j for j, v in enumerate(votes))
        assert got[i, 1] == (0xFFFFFFFF if votes.all() else 0)


def test_active_mask_and_special_registers(kernel):
    run = kernel(
        """
        mov.u32 %r0, %laneid;
        setp.lt.u32 %p0, %r0, 5;
        mov.u32 %r1, 0;
        @%p0 activemask.b32 %r1;
        mov.u32 %r2, %lanemask_lt;
        mov.u32 %r3, %warpid;
        mov.u32 %r4, %tid.y;
        mov.u32 %r5, %ntid.x;
        mad.lo.u32 %r6, %r4, %r5, %tid;
        mad.wide.u32 %rd1, %r6, 16, %rd0;
        st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};
        """,
        1,
    )
    got = np.zeros((64, 4), np.uint32)
    run.launch(1, (16, 4), [got])
    lane = np.arange(64) % 32
    np.testing.assert_array_equal(got[:, 0], np.where(lane < 5, 31, 0))
    np.testing.assert_array_equal(got[:, 1], (1 << lane) - 1)
    np.testing.assert_array_equal(got[:, 2], np.arange(64) // 32)
    np.testing.assert_array_equal(got[:, 3], np.arange(64) // 16)


def test_grid_registers(kernel):
    run = kernel(
        """
        mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z;
        mov.u32 %r3, %nctaid.x; mov.u32 %r4, %nctaid.y;
        mad.lo.u32 %r5, %r2, %r4, %r1;
        mad.lo.u32 %r5, %r5, %r3, %r0;
        mad.wide.u32 %rd1, %r5, 4, %rd0;
        st.global.b32 [%rd1], %r5;
        """,
        1,
    )
    got = np.full(2 * 3 * 4, -1, np.int32)
    run.launch((2, 3, 4), 1, [got])
    np.testing.assert_array_equal(got, np.arange(24))
