"""Loads and stores in every space, and what is refused."""

import numpy as np
import pytest
import torch

from ptx_executor import LaunchError, MemoryAccessError, Module, Pointer, poison

COPY = """
mad.wide.u32 %rd2, %tid, 4, %rd0;
mad.wide.u32 %rd3, %tid, 4, %rd1;
ld.global.b32 %r0, [%rd2];
st.global.b32 [%rd3], %r0;
"""


@pytest.mark.parametrize(
    ("vector", "kind", "dtype"), [("v2", "b32", "u4"), ("v4", "b32", "u4"), ("v2", "b64", "u8")]
)
def test_vectors(kernel, vector, kind, dtype):
    count, size = int(vector[1]), np.dtype(dtype).itemsize
    registers = ", ".join(f"%{'r' if size == 4 else 'fd'}{i}" for i in range(count))
    backwards = ", ".join(registers.split(", ")[::-1])
    run = kernel(
        f"""
        mad.wide.u32 %rd2, %tid, {size * count}, %rd0;
        mad.wide.u32 %rd3, %tid, {size * count}, %rd1;
        ld.global.nc.L1::evict_first.L2::128B.{vector}.{kind} {{ {registers} }}, [ %rd2 + 0 ];
        st.global.{vector}.{kind} [%rd3], {{{backwards}}};
        """,
        2,
    )
    x = np.arange(40 * count, dtype=dtype)
    y = poison(np.empty_like(x))
    report = run.launch(1, 40, [x, y])
    np.testing.assert_array_equal(y.reshape(-1, count), x.reshape(-1, count)[:, ::-1])
    assert report.global_load_bytes == report.global_store_bytes == x.nbytes


def test_narrow_loads_extend(kernel):
    run = kernel(
        """
        mad.wide.u32 %rd2, %tid, 1, %rd0;
        mad.wide.u32 %rd3, %tid, 8, %rd1;
        ld.global.s8 %r0, [%rd2];
        ld.global.u8 %r1, [%rd2];
        st.global.v2.b32 [%rd3], {%r0, %r1};
        """,
        2,
    )
    x = np.arange(256, dtype=np.uint8)
    y = np.zeros((256, 2), np.int32)
    run.launch(1, 256, [x, y])
    np.testing.assert_array_equal(y, np.stack([x.view(np.int8), x], 1).astype(np.int32))


def test_narrow_stores_cut(kernel):
    run = kernel("mad.wide.u32 %rd1, %tid, 1, %rd0;\nadd.u32 %r0, %tid, 200;\nst.global.u8 [%rd1], %r0;", 1)
    y = np.zeros(100, np.uint8)
    run.launch(1, 100, [y])
    np.testing.assert_array_equal(y, (np.arange(100) + 200).astype(np.uint8))


def test_generic_addresses_reach_shared_local_and_global_memory(kernel):
    run = kernel(
        """
        // even threads take a shared address, odd ones a local one
        cvta.shared.u64 %rd2, buffer;
        mad.wide.u32 %rd2, %tid, 4, %rd2;
        cvta.local.u64 %rd3, own;
        and.b32 %r0, %tid, 1;
        setp.eq.u32 %p0, %r0, 0;
        selp.b64 %rd4, %rd2, %rd3, %p0;
        st.b32 [%rd4], %tid;
        ld.b32 %r1, [%rd4];
        isspacep.shared %p1, %rd4;
        selp.b32 %r2, 1000, 0, %p1;
        add.u32 %r1, %r1, %r2;
        cvta.global.u64 %rd5, %rd0;
        mad.wide.u32 %rd5, %tid, 4, %rd5;
        st.b32 [%rd5], %r1;
        """,
        1,
        registers=".shared .align 4 .b8 buffer[256];\n.local .align 4 .b8 own[4];",
    )
    y = np.zeros(64, np.int32)
    run.launch(1, 64, [y])
    np.testing.assert_array_equal(y, np.arange(64) + np.where(np.arange(64) % 2 == 0, 1000, 0))


def test_shared_memory_is_static_then_dynamic_and_starts_as_nan(kernel):
    run = kernel(
        """
        mov.u32 %r0, fixed;
        mov.u32 %r1, rest;
        sub.u32 %r2, %r1, %r0;
        mad.lo.u32 %r3, %tid, 4, %r1;
        ld.shared.f32 %f0, [%r3];
        mad.wide.u32 %rd2, %tid, 4, %rd0;
        st.global.f32 [%rd2], %f0;
        st.global.u32 [%rd1], %r2;
        """,
        2,
        registers=".shared .align 4 .b8 fixed[12];",
        top=".extern .shared .align 16 .b8 rest[];",
    )
    y, offset = np.zeros(32, np.float32), np.zeros(1, np.uint32)
    report = run.launch(1, 32, [y, offset], shared_bytes=128)
    assert np.isnan(y).all()
    assert offset[0] == 16
    assert report.shared_bytes == 16 + 128
    with pytest.raises(MemoryAccessError, match="outside the 140 bytes of shared memory"):
        run.launch(1, 32, [y, offset], shared_bytes=124)


def test_local_memory_is_each_threads_own(kernel):
    run = kernel(
        """
        mov.u64 %rd2, own;
        st.local.v2.b32 [%rd2+8], {%tid, %r5};
        ld.local.b32 %r1, [own+8];
        mad.wide.u32 %rd3, %tid, 4, %rd0;
        st.global.b32 [%rd3], %r1;
        """,
        1,
        registers=".local .align 8 .b8 own[16];",
    )
    y = np.zeros(96, np.int32)
    run.launch(1, 96, [y])
    np.testing.assert_array_equal(y, np.arange(96))


def test_variables_of_the_module():
    module = Module.from_ptx(
        """
        .version 8.7
        .target sm_80
        .address_size 64
        .const .align 4 .f32 table[3] = {0f3F800000, 0f40000000, 0fC0400000};
        .global .align 4 .u32 counter = 40;
        .global .align 8 .u64 where = counter;
        .visible .entry test(.param .u64 out) {
            .reg .b64 %rd<4>; .reg .b32 %r<4>; .reg .f32 %f<2>;
            ld.param.u64 %rd0, [out];
            ld.const.f32 %f0, [table+8];
            st.global.f32 [%rd0], %f0;
            ld.global.u64 %rd1, [where];
            ld.global.u32 %r0, [%rd1];
            add.u32 %r0, %r0, 1;
            st.global.u32 [counter], %r0;
            ret;
        }
        """
    )
    y = np.zeros(1, np.float32)
    for expected in (41, 42):
        module["test"].launch(1, 1, [y])
        assert module.variables["counter"].view(np.uint32)[0] == expected
    assert y[0] == -3.0
    module.variables["table"].view(np.float32)[2] = 5.0
    module["test"].launch(1, 1, [y])
    assert y[0] == 5.0


@pytest.mark.parametrize(
    ("threads", "where"), [(11, "4 bytes past the end of argument 0"), (200, "past the end")]
)
def test_loads_out_of_bounds(kernel, threads, where):
    with pytest.raises(MemoryAccessError, match=where):
        kernel(COPY, 2).launch(1, threads, [np.zeros(10, np.int32), np.zeros(300, np.int32)])


def test_the_message_names_kernel_line_thread_and_instruction(kernel):
    with pytest.raises(MemoryAccessError) as caught:
        kernel(COPY, 2).launch((1, 2), 16, [np.zeros(100, np.int32), np.zeros(15, np.int32)])
    message = str(caught.value)
    assert message.startswith("test, line ")
    assert "thread (15, 0, 0): 4 bytes stored to global address" in message
    assert "4 bytes past the end of argument 1 (60 bytes)" in message
    assert message.endswith("st.global.b32 [%rd3], %r0")


def test_before_the_start_and_null(kernel):
    run = kernel("ld.global.b32 %r0, [%rd0+-4];\nst.global.b32 [%rd0], %r0;", 1)
    with pytest.raises(MemoryAccessError, match="4 bytes before the start of argument 0"):
        run.launch(1, 1, [np.zeros(4, np.int32)])
    with pytest.raises(MemoryAccessError, match="no global memory"):
        run.launch(1, 1, [None])


def test_misaligned_vector(kernel):
    run = kernel("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd0+8];\nst.global.b32 [%rd0], %r0;", 1)
    with pytest.raises(MemoryAccessError, match="not a multiple of 16"):
        run.launch(1, 1, [np.zeros(16, np.int32)])


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_view_keeps_the_alignment_it_has_in_its_allocation(kernel, library):
    run = kernel("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd0];\nst.global.b32 [%rd0], %r3;", 1)
    x = np.arange(16, dtype=np.int32) if library == "numpy" else torch.arange(16, dtype=torch.int32)
    run.launch(1, 1, [x[4:]])
    assert x.tolist()[:6] == [0, 1, 2, 3, 7, 5]
    with pytest.raises(MemoryAccessError, match="not a multiple of 16"):
        run.launch(1, 1, [x[1:]])


def test_a_pointer_into_an_array_keeps_all_of_it_in_reach(kernel):
    run = kernel("ld.global.b32 %r0, [%rd0+-4];\nst.global.b32 [%rd0], %r0;", 1)
    x = torch.arange(8, dtype=torch.int32)
    run.launch(1, 1, [Pointer(x, 12)])
    assert x.tolist() == [0, 1, 2, 2, 4, 5, 6, 7]
    with pytest.raises(MemoryAccessError, match="4 bytes before the start"):
        run.launch(1, 1, [Pointer(x, 0)])
    vector = kernel("ld.global.v2.b32 {%r0, %r1}, [%rd0];\nst.global.b32 [%rd0], %r1;", 1)
    with pytest.raises(MemoryAccessError, match="not a multiple of 8"):
        vector.launch(1, 1, [Pointer(x[1:], 0)])


def test_overlapping_views_share_their_memory(kernel):
    fused = torch.arange(64, dtype=torch.int32).reshape(16, 4)
    left, right = fused[:, :2], fused[:, 2:]  # strides of 4
    run = kernel(
        """
        mad.wide.u32 %rd2, %tid, 16, %rd0;
        mad.wide.u32 %rd3, %tid, 16, %rd1;
        ld.global.b32 %r0, [%rd2];
        st.global.b32 [%rd3], %r0;
        """,
        2,
    )
    run.launch(1, 16, [left, right])
    assert torch.equal(fused[:, 2], torch.arange(0, 64, 4, dtype=torch.int32))
    assert torch.equal(fused[:, 3], torch.arange(3, 64, 4, dtype=torch.int32))


def test_a_read_only_array_is_not_stored_to(kernel):
    x, y = np.zeros(32, np.int32), np.zeros(32, np.int32)
    x.flags.writeable = False
    kernel(COPY, 2).launch(1, 32, [x, y])
    with pytest.raises(MemoryAccessError, match="argument 1, and that is read-only"):
        kernel(COPY, 2).launch(1, 32, [y, x])


def test_bfloat16_tensors_and_empty_ones(kernel):
    x = torch.randn(64).bfloat16()
    y = torch.full((64,), float("nan")).bfloat16()
    kernel(COPY, 2).launch(1, 32, [x, y])
    assert torch.equal(x, y)
    with pytest.raises(MemoryAccessError, match=r"argument 0 \(0 bytes\)"):
        kernel(COPY, 2).launch(1, 32, [x[:0], x])


def test_what_a_launch_refuses(kernel):
    run, x = kernel(COPY, 2), np.zeros(32, np.int32)
    with pytest.raises(LaunchError, match="expected 2 arguments, got 1"):
        run.launch(1, 32, [x])
    with pytest.raises(LaunchError, match="more than 1024"):
        run.launch(1, (32, 33), [x, x])
    with pytest.raises(LaunchError, match="grid: expected one to three positive numbers"):
        run.launch((1, 0), 32, [x, x])
    with pytest.raises(LaunchError, match="shared_bytes"):
        run.launch(1, 32, [x, x], shared_bytes=1 << 20)
    with pytest.raises(LaunchError, match="8 bytes, got 4"):
        run.launch(1, 32, [x, np.int32(3)])
    with pytest.raises(LaunchError, match="got str"):
        run.launch(1, 32, [x, "x"])
    for grid, block, message in (
        ((1, 65536), 32, r"grid: expected at most \(2147483647, 65535, 65535\), got \(1, 65536, 1\)"),
        (1, (1, 1, 65), r"block: expected at most \(1024, 1024, 64\), got \(1, 1, 65\)"),
        (1.5, 32, "grid: expected one to three positive numbers, got 1.5"),
        ("4", 32, "grid: expected one to three positive numbers, got '4'"),
        (None, 32, "grid: expected one to three positive numbers, got None"),
        ((1, 1, 1, 1), 32, "grid: expected one to three"),
    ):
        with pytest.raises(LaunchError, match=message):
            run.launch(grid, block, [x, x])
    with pytest.raises(LaunchError, match="wave_blocks: expected an integer from 1 on, got -1"):
        run.launch(1, 32, [x, x], wave_blocks=-1)  # no block would run
    with pytest.raises(LaunchError, match="seed: expected an integer from 0 on, got -1"):
        run.launch(1, 32, [x, x], seed=-1)
    with pytest.raises(LaunchError, match="argument 1: expected an array of numbers, got one of object"):
        run.launch(1, 32, [x, np.array([None] * 32)])
    with pytest.raises(LaunchError, match="argument 1: expected a strided tensor on the CPU"):
        run.launch(1, 32, [x, torch.eye(4).to_sparse()])
    with pytest.raises(KeyError, match="this module has test"):
        Module.from_ptx("\n.version 8.7\n.target sm_80\n.entry test() { ret; }")["other"]


@pytest.mark.parametrize("store_first", [False, True])
@pytest.mark.parametrize(("hint", "distance", "fine"), [("", 0, True), (".nc", 0, False), (".nc", 40, True)])
def test_what_a_launch_stores_to_is_not_read_as_unchanging(kernel, store_first, hint, distance, fine):
    steps = [f"ld.global{hint}.b32 %r0, [%rd1];", "st.global.b32 [%rd2], %tid;"]
    run = kernel(
        f"mad.wide.u32 %rd1, %tid, 4, %rd0;\nadd.u64 %rd2, %rd1, {4 * distance};\n"
        + "\n".join(steps[::-1] if store_first else steps),
        1,
    )
    x = np.arange(80, dtype=np.uint32)
    if fine:
        run.launch(1, 40, [x])
        np.testing.assert_array_equal(x[distance : distance + 40], np.arange(40))
    else:
        with pytest.raises(MemoryAccessError, match="unchanging memory"):
            run.launch(1, 40, [x])
