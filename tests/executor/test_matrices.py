"""Tensor core instructions against float64, with the fragment layouts of the PTX manual written out lane by
lane.
"""

import numpy as np
import pytest
import torch

# kind: (numpy type of the bits, elements of a register, instruction types)
KINDS = {
    "f16": (np.uint16, 2, torch.float16),
    "bf16": (np.uint16, 2, torch.bfloat16),
    "tf32": (np.uint32, 1, torch.float32),
    "s8": (np.uint8, 4, torch.int8),
    "u8": (np.uint8, 4, torch.uint8),
}


def _a_position(lane: int, element: int, per: int) -> tuple[int, int]:
    """Row and column of element i of a lane's fragment of A, as the manual gives them for 8, 16 and 32
    bits.
    """
    group, thread = lane >> 2, lane & 3
    register, within = divmod(element, per)
    return group + 8 * (register % 2), thread * per + within + (register // 2) * 4 * per


def _b_position(lane: int, element: int, per: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane & 3
    register, within = divmod(element, per)
    return thread * per + within + register * 4 * per, group


def _c_position(lane: int, element: int) -> tuple[int, int]:
    return (lane >> 2) + 8 * (element // 2), (lane & 3) * 2 + element % 2


def _matrix(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        low = -128 if dtype is torch.int8 else 0
        return torch.randint(low, low + 256, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _fragment(matrix: torch.Tensor, bits: type, count: int, position) -> np.ndarray:
    """`[32, count]` elements for the lanes, as their bits."""
    raw = matrix.contiguous().view(getattr(torch, f"uint{8 * np.dtype(bits).itemsize}")).numpy()
    return np.array([[raw[position(lane, i)] for i in range(count)] for lane in range(32)], bits)


def _registers(prefix: str, start: int, count: int) -> str:
    return "{" + ", ".join(f"%{prefix}{start + i}" for i in range(count)) + "}"


@pytest.mark.parametrize(
    ("kind", "depth", "accumulator"),
    [("bf16", 16, "f32"), ("bf16", 8, "f32"), ("f16", 16, "f32"), ("f16", 8, "f32"), ("f16", 16, "f16"),
     ("tf32", 8, "f32"), ("tf32", 4, "f32"), ("s8", 32, "s32"), ("s8", 16, "s32"), ("u8", 32, "s32")],
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_mma(kernel, kind, depth, accumulator, masked):
    bits, per, dtype = KINDS[kind]
    a, b = _matrix((16, depth), dtype, 0), _matrix((depth, 8), dtype, 1)
    c_dtype = {"f32": torch.float32, "f16": torch.float16, "s32": torch.int32}[accumulator]
    c = _matrix((16, 8), torch.float32, 2).mul(100).to(c_dtype)
    counts = [16 * depth // 32, 8 * depth // 32]
    words = [count // per for count in counts]
    c_words = 2 if accumulator == "f16" else 4
    file = "r" if accumulator != "f32" else "f"
    loads = []
    for pointer, (count, prefix, start) in enumerate(
        [(words[0], "r", 0), (words[1], "r", 8), (c_words, file, 16)]
    ):
        loads.append(f"mad.wide.u32 %rd5, %tid, {4 * count}, %rd{pointer};")
        loads += [f"ld.global.b32 %{prefix}{start + i}, [%rd5+{4 * i}];" for i in range(count)]
    d_registers, c_registers = _registers(file, 20, c_words), _registers(file, 16, c_words)
    # With `masked`, the second warp jumps over the instruction.
    skip = "setp.gt.u32 %p0, %tid, 31;\n@%p0 bra END;\n" if masked else ""
    run = kernel(
        skip
        + "\n".join(loads)
        + f"""
        mma.sync.aligned.m16n8k{depth}.row.col.{accumulator}.{kind}.{kind}.{accumulator}
            {d_registers}, {_registers("r", 0, words[0])}, {_registers("r", 8, words[1])}, {c_registers};
        mad.wide.u32 %rd6, %tid, {4 * c_words}, %rd3;
        """
        + "\n".join(f"st.global.b32 [%rd6+{4 * i}], %{file}{20 + i};" for i in range(c_words))
        + "\nEND:",
        4,
    )
    warps = 1 if masked else 2
    elements = [
        _fragment(a, bits, counts[0], lambda lane, i: _a_position(lane, i, per)),
        _fragment(b, bits, counts[1], lambda lane, i: _b_position(lane, i, per)),
        _fragment(c, np.uint16 if accumulator == "f16" else np.uint32, 4, _c_position),
    ]
    d = np.zeros((32 * warps, 4), np.uint16 if accumulator == "f16" else np.uint32)
    run.launch(1, 64, [*(np.tile(each, (warps, 1)) for each in elements), d])
    if kind == "tf32":
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    expected = a.double() @ b.double() + c.double()
    raw = (
        torch.from_numpy(d.view(np.int16 if accumulator == "f16" else np.int32))
        .view(c_dtype)
        .reshape(warps, 32, 4)
    )
    for warp in range(warps):
        got = torch.zeros(16, 8, dtype=torch.float64)
        for lane in range(32):
            for i in range(4):
                got[_c_position(lane, i)] = raw[warp, lane, i].double()
        if accumulator == "s32":
            assert torch.equal(got, expected)
        else:
            step = 2.0**-10 if accumulator == "f16" else 2.0**-22
            magnitude = a.double().abs() @ b.double().abs() + c.double().abs()
            assert ((got - expected).abs() <= step * magnitude).all()


@pytest.mark.parametrize(("mode", "expected"), [(".satfinite", 2**31 - 1), ("", -(2**31) + 1010)])
def test_integers_saturate_on_request(kernel, mode, expected):
    run = kernel(
        f"""
        mov.b32 %r0, 0x01010101;
        mov.b32 %r1, 0x20202020;
        mov.b32 %r4, 0x7ffffff2;
        mma.sync.aligned.m16n8k32.row.col{mode}.s32.s8.s8.s32
            {{%r5,%r6,%r7,%r8}}, {{%r0,%r0,%r0,%r0}}, {{%r1,%r1}}, {{%r4,%r4,%r4,%r4}};
        mad.wide.u32 %rd1, %tid, 4, %rd0;
        st.global.b32 [%rd1], %r7;
        """,
        1,
    )
    d = np.zeros(32, np.int32)
    run.launch(1, 32, [d])
    assert (d == expected).all()


def test_mma_chain_keeps_its_accumulator_when_a_register_changes(kernel):
    """Fragments are kept between instructions; a register that is written in between has to be seen."""
    run = kernel(
        """
        mov.b32 %r0, 0x3f803f80; // bf16 ones
        mov.f32 %f0, 0f00000000;
        mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f0,%f1,%f2,%f3}, {%r0,%r0,%r0,%r0}, {%r0,%r0},
        {%f0,%f1,%f2,%f3}; mul.f32 %f1, %f1, 0f40000000; mov.b32 %r0, 0x40004000; // twos
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f0,%f1,%f2,%f3}, {%r0,%r0,%r0,%r0}, {%r0,%r0},
        {%f0,%f1,%f2,%f3}; mad.wide.u32 %rd1, %tid, 16, %rd0; st.global.v4.f32 [%rd1], {%f0,%f1,%f2,%f3}; """,
        1,
    )
    d = np.zeros((32, 4), np.float32)
    run.launch(1, 32, [d])
    np.testing.assert_array_equal(d, np.tile([80.0, 96.0, 80.0, 80.0], (32, 1)))


def test_mma_under_a_guard_takes_its_own_warps(kernel):
    """A fragment that was built for all warps is not that of the warps for which a guard holds."""
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    tile = "{%f0,%f1,%f2,%f3}, {%r0,%r0,%r0,%r0}, {%r0,%r0}, {%f0,%f1,%f2,%f3}"
    run = kernel(
        f"""
        mov.b32 %r0, 0x3f803f80;
        mov.f32 %f0, 0f00000000;
        mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
        setp.gt.u32 %p0, %tid, 31;
        {mma} {tile};
        @%p0 {mma} {tile};
        {mma} {tile};
        mad.wide.u32 %rd1, %tid, 4, %rd0;
        st.global.f32 [%rd1], %f3;
        """,
        1,
    )
    d = np.zeros(96, np.float32)
    run.launch(1, 96, [d])
    np.testing.assert_array_equal(d, np.repeat([32.0, 48.0, 48.0], 32))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(kernel, count, transposed):
    trans = ".trans" if transposed else ""
    registers = _registers("r", 0, count)
    body = f"""
        mul.lo.u32 %r10, %tid, 16;          // each lane brings 16 bytes to shared memory
        mov.u32 %r11, tile;
        add.u32 %r12, %r11, %r10;
        mad.wide.u32 %rd2, %tid, 16, %rd0;
        ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd2];
        st.shared.v4.b32 [%r12], {{%r20, %r21, %r22, %r23}};
        bar.sync 0;
        xor.b32 %r10, %r10, 48;             // rows in an order of our own
        add.u32 %r12, %r11, %r10;
        OPERATION
        mad.wide.u32 %rd3, %tid, {4 * count}, %rd1;
        """
    tile = np.random.default_rng(0).integers(0, 2**16, (32, 8), np.uint16)
    order = np.arange(32) ^ 3
    load = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r12];"
    out = "\n".join(f"st.global.b32 [%rd3+{4 * i}], %r{i};" for i in range(count))
    space = ".shared .align 16 .b8 tile[512];"
    got = np.zeros((32, count, 2), np.uint16)
    kernel(body.replace("OPERATION", load) + out, 2, registers=space).launch(1, 32, [tile, got])
    for j in range(count):
        matrix = tile[order[8 * j : 8 * j + 8]]
        matrix = matrix.T if transposed else matrix
        for lane in range(32):
            assert got[lane, j].tolist() == matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()
    # What is stored the same way comes back: rows of zeros elsewhere show that nothing else is touched.
    store = f"""
        {load}
        mov.b32 %r20, 0;
        bar.warp.sync -1;
        st.shared.v4.b32 [%r12], {{%r20, %r20, %r20, %r20}};
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r12], {registers};
        mad.wide.u32 %rd3, %tid, 16, %rd1;
        mad.lo.u32 %r12, %tid, 16, %r11;
        ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r12];
        st.global.v4.b32 [%rd3], {{%r20, %r21, %r22, %r23}};
        """
    back = np.zeros((32, 8), np.uint16)
    kernel(body.replace("OPERATION", store), 2, registers=space).launch(1, 32, [tile, back])
    kept = np.isin(np.arange(32), order[: 8 * count])
    np.testing.assert_array_equal(back, np.where(kept[:, None], tile, 0))
