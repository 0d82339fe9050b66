"""Races in shared memory are found whatever the order of the warps; what is ordered is not reported."""

import numpy as np
import pytest

from ptx_executor import RaceError

SHARED = ".shared .align 16 .b8 buffer[1024];"
OWN = """
mov.u32 %r10, buffer;
mad.lo.u32 %r11, %tid, 4, %r10;
xor.b32 %r12, %tid, OTHER;
mad.lo.u32 %r12, %r12, 4, %r10;
"""
STORE = "st.shared.b32 [%r11], %tid;\n"
LOAD = "ld.shared.b32 %r0, [%r12];\n"


def _launch(kernel, body: str, other: int, seed: int, threads: int = 128, **options) -> None:
    kernel(OWN.replace("OTHER", str(other)) + body, 0, registers=SHARED).launch(
        2, threads, [], seed=seed, **options
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("body", "what"),
    [
        (STORE + LOAD, "reads|writes"),
        (STORE + "bar.sync 0;\n" + LOAD + STORE, "writes|reads"),
        ("st.shared.b32 [buffer], %tid;\n", "writes"),
        (
            STORE + "bar.sync 0;\nred.shared.add.u32 [%r12], 1;\n" + "ld.shared.b32 %r0, [%r11];\n",
            "updates|reads",
        ),
    ],
)
def test_races_between_warps(kernel, body, what, seed):
    with pytest.raises(
        RaceError, match=rf"warp \d ({what}) .* at line \d+, but warp \d ({what}) it at line \d+"
    ):
        _launch(kernel, body, 32, seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "body",
    [
        STORE + "bar.sync 0;\n" + LOAD + "bar.sync 0;\n" + STORE,
        STORE + "bar.sync 0;\n" + "red.shared.add.u32 [buffer], 1;\n" + "bar.sync 1;\n" + LOAD,
        "ld.shared.b32 %r0, [buffer];\n",
    ],
)
def test_what_barriers_order_is_no_race(kernel, body, seed):
    _launch(kernel, body, 32, seed)


def test_two_warps_may_write_the_same_value(kernel):
    _launch(kernel, "st.shared.b32 [buffer], 7;\nbar.sync 0;\nld.shared.b32 %r0, [buffer];\n", 32, 0)
    with pytest.raises(RaceError):  # but whoever reads has to wait for both of them
        _launch(kernel, "st.shared.b32 [buffer], 7;\nld.shared.b32 %r0, [buffer];\n", 32, 0)


def test_lanes_of_one_warp_are_not_told_apart(kernel):
    _launch(kernel, STORE + LOAD, 16, 0)


def test_narrow_neighbours_do_not_collide(kernel):
    body = "mov.u32 %r10, buffer;\nadd.u32 %r10, %r10, %tid;\n"
    body += "st.shared.b8 [%r10], %tid;\nld.shared.b8 %r0, [%r10];\n"
    kernel(body, 0, registers=SHARED).launch(1, 66, [])


def test_a_barrier_of_two_warps_orders_only_these(kernel):
    """Warps 0 and 1 meet at one barrier, 2 and 3 at another."""
    body = STORE + "shr.u32 %r1, %tid, 6;\nadd.u32 %r1, %r1, 1;\nsetp.eq.u32 %p0, %r1, 1;\n"
    body += "@%p0 bra FIRST;\nbar.sync 2, 64;\nbra.uni MET;\nFIRST:\nbar.sync 1, 64;\nMET:\n" + LOAD
    _launch(kernel, body, 32, 0)
    with pytest.raises(RaceError):
        _launch(kernel, body, 64, 0)


def test_detection_may_be_switched_off(kernel):
    _launch(kernel, STORE + LOAD, 32, 0, detect_races=False)


def test_a_missing_barrier_also_shows_in_the_numbers(kernel):
    """Without detection, some seed reads what is not there yet."""
    body = (
        OWN.replace("OTHER", "96")
        + STORE
        + LOAD
        + "mad.wide.u32 %rd1, %tid, 4, %rd0;\nst.global.b32 [%rd1], %r0;"
    )
    run = kernel(body, 1, registers=SHARED)
    wrong = 0
    for seed in range(5):
        y = np.zeros(128, np.int32)
        run.launch(1, 128, [y], seed=seed, detect_races=False)
        wrong += (y != np.arange(128) ^ 96).any()
    assert wrong == 5


@pytest.mark.parametrize(("stride", "conflicts"), [(4, 0), (8, 1), (128, 31), (0, 0), (132, 0)])
def test_bank_conflicts(kernel, stride, conflicts):
    body = f"mov.u32 %r10, buffer;\nmad.lo.u32 %r10, %tid, {stride}, %r10;\nld.shared.b32 %r0, [%r10];\n"
    run = kernel(body, 0, registers=".shared .align 16 .b8 buffer[8192];")
    assert run.launch(1, 32, [], count_bank_conflicts=True).bank_conflicts == conflicts
