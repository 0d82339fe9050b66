"""cp.async: data comes at its wait and not before."""

import numpy as np
import pytest

from ptx_executor import MemoryAccessError, RaceError

SHARED = ".shared .align 16 .b8 tile[4096];"
SETUP = """
mov.u32 %r10, tile;
mad.lo.u32 %r10, %tid, 16, %r10;
mad.wide.u32 %rd2, %tid, 16, %rd0;
mad.wide.u32 %rd3, %tid, 16, %rd1;
"""
READ = "ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%r10];\nst.global.v4.b32 [%rd3], {%r0, %r1, %r2, %r3};"
COPY = "cp.async.cg.shared.global [%r10], [%rd2], 16;\n"


def _launch(kernel, body: str, **options) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).integers(0, 255, (64, 16), np.uint8)
    y = np.zeros((64, 16), np.uint8)
    kernel(SETUP + body, 2, registers=SHARED).launch(1, 64, [x, y], **options)
    return x, y


def test_data_comes_with_its_wait(kernel):
    x, y = _launch(kernel, COPY + "cp.async.commit_group;\ncp.async.wait_group 0;\n" + READ)
    np.testing.assert_array_equal(x, y)
    x, y = _launch(kernel, COPY + "cp.async.wait_all;\n" + READ)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "body",
    [
        COPY + "cp.async.commit_group;\n" + READ,
        COPY + "cp.async.commit_group;\ncp.async.wait_group 1;\n" + READ,
        COPY + "cp.async.wait_group 0;\n" + READ,  # never committed
    ],
)
def test_data_does_not_come_before(kernel, body):
    _, y = _launch(kernel, body, detect_races=False)
    assert (y == 0xFF).all()
    with pytest.raises(
        RaceError, match=r"an asynchronous copy of warp . .line .* to it has not been waited for"
    ):
        _launch(kernel, body)


def test_early_copies_land_at_some_time_before(kernel):
    seen = set()
    for seed in range(8):
        x, y = _launch(kernel, COPY + READ, detect_races=False, early_copies=True, seed=seed)
        landed = (y == x).all(1)
        assert ((y == 0xFF).all(1) | landed).all()
        seen.add(int(landed.sum()))
    assert len(seen) > 2
    x, y = _launch(kernel, COPY + "cp.async.wait_all;\n" + READ, early_copies=True)
    np.testing.assert_array_equal(x, y)


def test_groups_come_in_their_order(kernel):
    body = """
    cp.async.ca.shared.global [%r10], [%rd2], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r10+4], [%rd2+4], 8;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r10+12], [%rd2+12], 4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    """
    x, y = _launch(
        kernel, body.replace("[%r10+4], [%rd2+4], 8", "[%r10+8], [%rd2+8], 8") + READ, detect_races=False
    )
    assert (y[:, :4] == x[:, :4]).all()
    assert (y[:, 8:12] == x[:, 8:12]).all()
    assert (y[:, 4:8] == 0xFF).all()


def test_missing_bytes_are_zero(kernel):
    body = """
    and.b32 %r5, %tid, 3;
    mul.lo.u32 %r5, %r5, 5;
    cp.async.cg.shared.global.L2::128B [%r10], [%rd2], 16, %r5;
    cp.async.wait_all;
    """
    x, y = _launch(kernel, body + READ)
    used = np.arange(64) % 4 * 5
    np.testing.assert_array_equal(y, np.where(np.arange(16) < used[:, None], x, 0))


def test_a_copy_of_no_bytes_may_point_anywhere(kernel):
    body = "mov.u64 %rd2, 12345;\ncp.async.cg.shared.global [%r10], [%rd2], 16, 0;\ncp.async.wait_all;\n"
    _, y = _launch(kernel, body + READ)
    assert (y == 0).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.u64 %rd2, %rd2, 8;\n", "source of cp.async is not a multiple of 16"),
        ("add.u32 %r10, %r10, 8;\n", "shared address .* is not a multiple of 16"),
        ("add.u64 %rd2, %rd2, 64;\n", "16 bytes past the end of argument 0"),
        ("add.u32 %r10, %r10, 4000;\n", "outside the 4096 bytes of shared"),
    ],
)
def test_copies_are_checked_when_they_start(kernel, body, message):
    with pytest.raises(MemoryAccessError, match=message):
        _launch(kernel, body + COPY)
