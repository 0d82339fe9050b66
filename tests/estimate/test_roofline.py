"""Time from work, and blocks from registers, against numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch

from stream_r1.estimate import devices, roofline
from stream_r1.estimate.roofline import Assumptions, KernelSize, limit, seconds
from stream_r1.estimate.work import Work

PEAKS = Assumptions(
    memory=1, matmul=1, convolution=1, library_attention={(9, 0): 1}, own_attention={(9, 0): 0.5}, kernel=1e-6
)
H100 = devices.DEVICES["H100"]


def test_the_slower_of_memory_and_arithmetic() -> None:
    work = Work("aten.mm", "matmul", torch.bfloat16, flops=int(H100.matmul16), bytes=int(H100.bandwidth) // 2)
    assert seconds([work], H100, PEAKS) == pytest.approx(1)
    assert limit(work, H100, PEAKS) == "compute"
    work = replace(work, bytes=2 * int(H100.bandwidth), calls=3)
    assert seconds([work], H100, PEAKS) == pytest.approx(6)
    assert limit(work, H100, PEAKS) == "memory"
    single = replace(work, dtype=torch.float32, bytes=0, flops=int(H100.float32), calls=1)
    assert seconds([single], H100, PEAKS) == pytest.approx(1)


def test_shares() -> None:
    work = Work("aten._sdpa", "attention", torch.bfloat16, flops=int(H100.matmul16), bytes=0)
    assert seconds([work], H100, PEAKS) == pytest.approx(1)
    assert seconds([replace(work, op="stream_r1.chunk_attention")], H100, PEAKS) == pytest.approx(2)
    for device in devices.DEVICES.values():
        assert 0 < roofline.ASSUMED.own_attention[device.capability] <= 1
        assert 0 < roofline.ASSUMED.library_attention[device.capability] <= 1


@pytest.mark.parametrize(
    ("rows", "columns", "share"),
    [
        (128 * 132, 128, 1.0),  # a tile for each processor
        (128 * 132, 256, 1.0),
        (128 * 133, 128, 133 / 264),  # and one more, for which the others wait
        (127 * 132, 128, 127 / 128),  # tiles over the edge: 131 of them
        (4680, 1536, 4680 * 1536 / (2 * 132 * 128 * 256)),  # of a chunk of 1.3B: 222 of 264 places
        (1, 1, 1 / (132 * 128 * 128)),
    ],
)
def test_tiles_that_do_not_fill_the_processors_take_as_long(rows: int, columns: int, share: float) -> None:
    assert roofline.tile_share(rows, columns, H100.processors) == pytest.approx(share)
    flops = int(1e18 * share)
    work = Work("aten.mm", "matmul", torch.bfloat16, flops=flops, bytes=0, matrix=(rows, columns))
    assert seconds([work], H100, PEAKS) == pytest.approx(1e18 / H100.matmul16)


def test_small_ops_wait_for_python_unless_they_are_a_graph() -> None:
    tiny = Work("aten.add", "elementwise", torch.float32, flops=0, bytes=4, calls=1000)
    assert limit(tiny, H100) == "launch"
    assert seconds([tiny], H100, graph=True) == pytest.approx(1000 * roofline.ASSUMED.kernel)
    assert seconds([tiny], H100) == pytest.approx(1000 * roofline.ASSUMED.dispatch)


@pytest.mark.parametrize(
    ("size", "blocks"),
    [
        (KernelSize(threads=256, registers=32, shared=0), 8),  # all 2048 threads
        (KernelSize(threads=256, registers=208, shared=0), 1),  # 53248 of 65536 registers
        (KernelSize(threads=256, registers=128, shared=0), 2),
        (KernelSize(threads=256, registers=33, shared=0), 6),  # 40 a thread are handed out
        (KernelSize(threads=128, registers=32, shared=75 * 1024), 3),  # 228 kB of shared memory
        (KernelSize(threads=32, registers=16, shared=0), 32),
    ],
)
def test_resident_blocks(size: KernelSize, blocks: int) -> None:
    assert size.resident_blocks(H100) == blocks
    assert size.occupancy(H100) == blocks * size.threads / 2048


@pytest.mark.parametrize(
    ("name", "device"), [("rtx4090", "RTX 4090"), ("4090", "RTX 4090"), ("h 100", "H100"), ("b2", "B200")]
)
def test_devices_by_name(name: str, device: str) -> None:
    assert devices.find(name).name == device


@pytest.mark.parametrize("name", ["V100", "100", "", "H100 80"])
def test_no_name_or_several(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected one of A100, H100, H200, RTX 4090, B200, got '{name}'"):
        devices.find(name)
