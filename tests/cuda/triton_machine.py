"""Runs the Triton attention without a GPU: its own launches, compiled by Triton, on the executor.

Triton is given a driver that names a GPU and can't launch; a launch compiles the kernel as on that GPU, from
the same arguments, and its PTX runs on tensors in ordinary memory. What the ops allocate starts as NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from ptx_executor import Kernel, Module
from stream_r1_kernels.attention import triton_attention, triton_kernels

CACHE = Path(__file__).parents[2] / "build/triton"


class _Driver:
    """Of a GPU that is not there; its number is its compute capability, as Triton keeps kernels by number."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def target(capability: int) -> Iterator[None]:
    """Within it Triton compiles for a GPU of this compute capability, such as 80."""
    config = triton.runtime.driver
    before = config._active
    config.set_active(_Driver(capability))
    try:
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = str(CACHE)
            yield
    finally:
        config._active = before


def compile_kernel(
    kernel: Any, config: triton_attention.Config, arguments: tuple[Any, ...], head_dim: int
) -> Any:
    """As `triton_attention.run` does, up to the launch."""
    blocks = {"BLOCK_Q": config.block_q, "BLOCK_K": config.block_k}
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return kernel.warmup(*arguments, D=head_dim, **blocks, **options, grid=(1,))


class Launch(NamedTuple):
    """What was run: the kernel's name, the grid, and instructions of warps."""

    name: str
    grid: tuple[int, int]
    instructions: int


class TritonMachine:
    """Launches go to it within `running`.

    Attributes:
        launches: in order.
    """

    def __init__(self) -> None:
        self._kernels: dict[str, Kernel] = {}
        self._options: dict[str, Any] = {}
        self.launches: list[Launch] = []

    @contextmanager
    def running(self, module: Any = triton_kernels, **options: Any) -> Iterator[None]:
        """The ops run on the executor, with `options` of its launches such as `seed`.

        Args:
            module: whose kernels are taken: those of the package, or with a fault.
        """
        ops, kept = triton_attention, (triton_attention.run, triton_attention.generation)
        fill = torch.are_deterministic_algorithms_enabled()
        self.launches, self._options = [], options
        ops.run, ops.generation, ops.kernels = self._run, lambda device: 8, module
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            with target(80):
                yield
        finally:
            (ops.run, ops.generation), ops.kernels = kept, triton_kernels
            torch.use_deterministic_algorithms(fill)

    def _run(
        self,
        kernel: Any,
        grid: tuple[int, int],
        config: triton_attention.Config,
        arguments: tuple[Any, ...],
        head_dim: int,
    ) -> None:
        compiled = compile_kernel(kernel, config, arguments, head_dim)
        if compiled.hash not in self._kernels:
            self._kernels[compiled.hash] = next(iter(Module.from_ptx(compiled.asm["ptx"]).values()))
        executable = self._kernels[compiled.hash]
        flat = [each for value in arguments for each in (value if isinstance(value, tuple) else (value,))]
        scratch = [None] * (len(executable.parameters) - len(flat))
        report = executable.launch(
            grid,
            32 * config.warps,
            [*flat, *scratch],
            shared_bytes=compiled.metadata.shared,
            **self._options,
        )
        self.launches.append(Launch(executable.name, grid, report.instructions))
