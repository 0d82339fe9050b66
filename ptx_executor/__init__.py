"""Execute PTX on a machine without a GPU.

`Module.from_ptx(text)[kernel].launch(grid, block, args)` runs a kernel as nvcc (sm_80) or Triton (cuda:80)
emits it on numpy arrays and CPU tensors: warps in random order, `cp.async` data late, every access checked,
races in shared memory found. See docs/ptx-executor.md.
"""

from .arguments import Pointer
from .dtypes import poison
from .errors import (
    BarrierError,
    DeviceAssertion,
    ExecutionTimeout,
    LaunchError,
    MemoryAccessError,
    ParseError,
    PtxError,
    RaceError,
    UnsupportedInstruction,
)
from .kernel import Kernel
from .module import Module
from .report import Report

__all__ = [
    "BarrierError",
    "DeviceAssertion",
    "ExecutionTimeout",
    "Kernel",
    "LaunchError",
    "MemoryAccessError",
    "Module",
    "ParseError",
    "Pointer",
    "PtxError",
    "RaceError",
    "Report",
    "UnsupportedInstruction",
    "poison",
]
