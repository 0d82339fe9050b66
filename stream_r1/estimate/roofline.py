"""Predicts time: counted work at a datasheet's rates, of which kernels reach a share that is assumed.

Every number that comes out of here is a prediction. The assumptions are few and in one place; none of them
was measured by this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from .devices import Device
from .work import FP8_PRODUCT, Work

Capability = tuple[int, int]
Limit = Literal["memory", "compute", "launch"]
HALF = (torch.bfloat16, torch.float16)
TILES = ((128, 256), (256, 128), (128, 128))  # of a matmul's result, one a processor at a time


def _library_attention() -> dict[Capability, float]:
    return {(8, 0): 0.65, (8, 9): 0.85, (9, 0): 0.60, (10, 0): 0.60}


def _own_attention() -> dict[Capability, float]:
    return {(8, 0): 0.60, (8, 9): 0.80, (9, 0): 0.33, (10, 0): 0.16}


@dataclass(frozen=True)
class Assumptions:
    """Shares of the datasheets' rates, and seconds that do not depend on sizes.

    Attributes:
        memory: of the bandwidth, by kernels that stream through memory.
        matmul: of the matmul rate, by torch's matmuls whose tiles fill all processors (see `tile_share`).
        matmul8: of the FP8 rate, by torch's row-wise product, the same. Less than `matmul`: sums are kept in
            float32 outside of the tensor cores, and memory has half the time.
        convolution: of the matmul rate, by cuDNN's 3D convolutions. Fitted: so that diffusers' decoder of
            Wan 2.1 takes the 10.3 s published for 81 frames of 720p on an A800 (an A100's rates).
        library_attention: of the matmul rate, by the dense attention that torch picks, by capability
            (FlashAttention-2 on 8.x, published at 50 to 73 % on A100; cuDNN on 9.0 and 10.0, of whose kind
            75 % are published for H100).
        own_attention: the same by our kernels, which use mma.sync. FlashAttention-2, which does too, is
            published at 35 % on H100; a processor of a B200 is taken to be as fast at it as one of an H100.
        link: of the links' rate in one direction, by collectives.
        kernel: seconds that a kernel takes at least.
        collective: seconds that a collective takes at least.
        dispatch: seconds of Python and torch for an op that is launched one by one; hidden as long as the GPU
            has more to do. A CUDA graph has none.
    """

    memory: float = 0.85
    matmul: float = 0.78
    matmul8: float = 0.62
    convolution: float = 0.28
    library_attention: dict[Capability, float] = field(default_factory=_library_attention)
    own_attention: dict[Capability, float] = field(default_factory=_own_attention)
    link: float = 0.7
    kernel: float = 2e-6
    collective: float = 2e-5
    dispatch: float = 8e-6


ASSUMED = Assumptions()


def seconds_a_call(work: Work, device: Device, assumed: Assumptions = ASSUMED) -> float:
    """One call: the longer of what memory takes and what arithmetic takes, and no less than a launch.

    What comes from other GPUs takes the link's time; nothing else runs meanwhile, for it is waited for.
    """
    if work.engine == "link":
        return max(work.bytes / (device.link / 2 * assumed.link), assumed.collective)
    memory = work.bytes / (device.bandwidth * assumed.memory)
    return max(memory, work.flops / _rate(work, device, assumed), assumed.kernel)


def seconds(
    work: Sequence[Work], device: Device, assumed: Assumptions = ASSUMED, *, graph: bool = False
) -> float:
    """All of it, one call after the other.

    Args:
        graph: replayed as CUDA graphs: the GPU never waits for Python.
    """
    busy = sum(w.calls * seconds_a_call(w, device, assumed) for w in work)
    return busy if graph else max(busy, assumed.dispatch * sum(w.calls for w in work))


def limit(
    work: Work, device: Device, assumed: Assumptions = ASSUMED
) -> Literal["memory", "compute", "launch"]:
    """What a call's time is made of."""
    memory = work.bytes / (device.bandwidth * assumed.memory)
    compute = work.flops / _rate(work, device, assumed)
    if max(memory, compute) <= assumed.kernel:
        return "launch"
    return "memory" if memory > compute else "compute"


def _rate(work: Work, device: Device, assumed: Assumptions) -> float:
    """Flops a second."""
    filled = 1.0 if work.matrix is None else tile_share(*work.matrix, device.processors)
    if work.op == FP8_PRODUCT:
        if device.matmul8 is None:
            raise ValueError(f"{work.op}: expected a GPU with FP8 tensor cores, got {device.name}")
        return device.matmul8 * assumed.matmul8 * filled
    on_tensor_cores = work.dtype in HALF
    peak = device.matmul16 if on_tensor_cores else device.float32
    if work.engine == "attention":
        own = work.op.startswith("stream_r1.")
        return peak * (assumed.own_attention if own else assumed.library_attention)[device.capability]
    if work.engine == "convolution":
        # torch lets cuDNN round float32 to TF32, which tensor cores multiply at half the rate
        return (peak if on_tensor_cores else device.matmul16 / 2) * assumed.convolution
    return peak * assumed.matmul * filled


def tile_share(rows: int, columns: int, processors: int) -> float:
    """The share of a matmul's work that is the result's: what tiles have past its edges, and processors that
    have no tile in the last round, take as long. Of the tilings the one that loses least.
    """
    shares = []
    for tile_rows, tile_columns in TILES:
        tiles = -(-rows // tile_rows) * -(-columns // tile_columns)
        rounds = -(-tiles // processors)
        shares.append(rows * columns / (rounds * processors * tile_rows * tile_columns))
    return max(shares)


# --- occupancy ---


@dataclass(frozen=True)
class KernelSize:
    """What a block of a kernel needs of a processor. Registers a thread, shared memory in bytes."""

    threads: int
    registers: int
    shared: int

    def resident_blocks(self, device: Device) -> int:
        """Blocks that fit a processor at once."""
        # registers are dealt out to warps, 256 at a time
        a_warp = -(-self.registers * 32 // 256) * 256
        by_registers = device.registers // (a_warp * (self.threads // 32))
        by_shared = device.shared // (self.shared + device.reserved)
        return min(by_registers, by_shared, device.threads // self.threads, device.blocks)

    def occupancy(self, device: Device) -> float:
        """Warps that fit a processor at once, of the warps that it can hold."""
        return self.resident_blocks(device) * self.threads / device.threads
