"""Runs the CUDA ops without a GPU: their own bindings and launch functions, and their PTX on the executor.

The ops' host code is built against tests/cuda/runtime.cpp, in which a launch is a call back to here, and
registered for a spare dispatch key. An op is called for that key with tensors in ordinary memory; what it
allocates is seen through a dispatch mode, and starts as NaN.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import toolchain
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ptx_executor import Kernel, Module, Pointer
from stream_r1_kernels.attention.cuda_backward import BACKWARDS
from stream_r1_kernels.registration import LIBRARIES

FAMILIES = ("attention", "dmd", "fp8", "norm", "rotary", "saliency")
KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)

_LAUNCH = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.c_void_p,
)


_TABLES: list[Tensor] = []  # of masks: an op keeps them from one call to the next


class _Allocations(TorchDispatchMode):
    """Keeps every tensor that an op makes, and fills the empty ones with NaN."""

    def __init__(self, memory: list[Tensor]) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                if tensor.dtype == torch.int32:
                    _TABLES.append(tensor)
                if "empty" in func.name() and tensor.numel():
                    tensor.view(-1).view(torch.uint8).fill_(0xFF)
                self.memory.append(tensor)
        return result


class _Calls(TorchDispatchMode):
    """Sends the ops to a machine, below autograd."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "stream_r1":
            return self._machine.run(func._opname, *args)
        return func(*args, **(kwargs or {}))


class Machine:
    """One launch after the other, in order.

    Attributes:
        launches: names of the kernels that were launched, in order.
        grids: their blocks in x, y, z.
    """

    def __init__(self) -> None:
        library, ptx = toolchain.build_host(Path(__file__).parent / "runtime.cpp")
        for name, backward in BACKWARDS.items():
            LIBRARIES[0].impl(name, backward, "PrivateUse1")
        self._module = Module.from_ptx(ptx)
        self._library = ctypes.CDLL(str(library))
        self._callback = _LAUNCH(self._launch)
        self._library.on_launch(self._callback)
        self._memory: list[Tensor] = []
        self._error: Exception | None = None
        self._replaced: dict[str, Kernel] = {}
        self._seed = 0
        self._execute = True
        self.launches: list[str] = []
        self.grids: list[tuple[int, ...]] = []

    def run(self, op: str, *args: Any, seed: int = 0, processors: int = 1) -> Any:
        """The CUDA implementation of torch.ops.stream_r1.<op>.

        Args:
            seed: of the order of warps and blocks.
            processors: of the GPU that the op takes this machine for.
        """
        self._library.set_processors(processors)
        self._memory = [value for value in args if isinstance(value, Tensor)] + _TABLES
        self._error, self._seed, self.launches, self.grids = None, seed, [], []
        overload = getattr(torch.ops.stream_r1, op).default
        with torch.no_grad(), _Allocations(self._memory):
            result = overload.redispatch(KEY, *args)
        if self._error is not None:
            raise self._error
        return result

    @contextmanager
    def taking_calls(self) -> Iterator[None]:
        """Within it the public functions, forward and backward, run here: a backend has to be "cuda"."""
        modules = [importlib.import_module(f"stream_r1_kernels.{family}.api") for family in FAMILIES]
        before = modules[0].resolve
        for module in modules:
            module.resolve = lambda backend, *call, **rest: backend
        try:
            with _Calls(self):
                yield
        finally:
            for module in modules:
                module.resolve = before

    @contextmanager
    def only_launching(self) -> Iterator[None]:
        """Within it `launches` and `grids` are all that comes of a launch: for sizes that take too long."""
        self._execute = False
        try:
            yield
        finally:
            self._execute = True

    @contextmanager
    def replaced(self, ptx: str) -> Iterator[None]:
        """Within it the kernels of `ptx` stand in for those of the same name."""
        self._replaced = dict(Module.from_ptx(ptx))
        try:
            yield
        finally:
            self._replaced = {}

    def _launch(self, name: bytes, grid: Any, block: Any, shared: int, argument: int) -> None:
        if self._error is not None:
            return
        try:
            self.launches.append(name.decode())
            self.grids.append(tuple(grid[:3]))
            if not self._execute:
                return
            kernel = self._replaced.get(name.decode()) or self._module[name.decode()]
            (parameter,) = kernel.parameters
            data = ctypes.string_at(argument, parameter.size)
            words = tuple(self._word(data[at : at + 8]) for at in range(0, len(data), 8))
            kernel.launch(grid[:3], block[:3], [words], shared_bytes=shared, seed=self._seed)
        except Exception as error:  # an exception can't pass through the C++ in between
            self._error = error

    def _word(self, data: bytes) -> bytes | Pointer:
        """Eight bytes of the arguments: memory, if they are an address in a known tensor, else themselves.

        A view keeps its place in its allocation: one that is not aligned on a GPU is not aligned here.
        """
        address = int.from_bytes(data, "little")
        best: tuple[int, int, Tensor] | None = None  # bytes before the address, all bytes
        for tensor in self._memory:
            low = tensor.data_ptr()
            if tensor.numel() == 0 or not low:
                continue
            reach = (
                sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            )
            size = reach * tensor.element_size()
            # the tensor that starts there, else the smallest that holds it
            if low <= address < low + size and (best is None or (address - low, size) < best[:2]):
                best = address - low, size, tensor
        return data if best is None else Pointer(best[2], best[0])
