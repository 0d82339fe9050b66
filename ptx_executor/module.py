"""A PTX module, loaded: the entry point of this package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from .errors import ParseError
from .kernel import Kernel
from .memory import GLOBAL_BASE, Region, round_up
from .parser import parse
from .program import Program, Symbol, Variable


class Module(Mapping[str, Kernel]):
    """The kernels of a PTX module by name, and its variables.

    >>> module = Module.from_ptx(text)
    >>> module["scale"].launch(grid=4, block=128, args=[x, y, x.size, 2.0])

    Attributes:
        program: the module as it was read.
        variables: bytes of the global and constant variables by name; launches change the global ones, and
            what is written here is seen by the next launch (as after `cudaMemcpyToSymbol`).
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.addresses: dict[str, tuple[str, int]] = {}
        self.regions: list[Region] = []
        self.variables: dict[str, NDArray[np.uint8]] = {}
        self.memory_end = 0
        placed = [variable for variable in program.variables if variable.space in ("global", "const")]
        for variable in placed:
            if variable.size is None:
                raise ParseError(f"variable {variable.name} has no size")
            start = round_up(self.memory_end + 256, 256)
            self.addresses[variable.name] = (variable.space, start)
            self.regions.append(
                Region(f"variable {variable.name}", start, variable.size, variable.space == "global")
            )
            self.memory_end = start + variable.size
        for variable in placed:
            self.variables[variable.name] = self._initial(variable)
        self._kernels = {name: Kernel(self, f) for name, f in program.functions.items() if f.is_kernel}

    @classmethod
    def from_ptx(cls, text: str) -> Module:
        """Load PTX.

        Raises:
            ParseError: naming the line, if the text is not understood.
        """
        return cls(parse(text))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Module:
        """Load a file of PTX."""
        with open(path, encoding="utf-8") as file:
            return cls.from_ptx(file.read())

    def _initial(self, variable: Variable) -> NDArray[np.uint8]:
        data = np.zeros(variable.size or 0, np.uint8)
        for offset, value, size in variable.init:
            if isinstance(value, Symbol):
                value = GLOBAL_BASE + self.addresses[value.name][1] + value.offset
            encoded = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            data[offset : offset + size] = np.frombuffer(encoded, np.uint8)
        return data

    def copy_in(self, memory: NDArray[np.uint8]) -> None:
        """Put the variables into the global memory of a launch."""
        for region, data in zip(self.regions, self.variables.values(), strict=True):
            memory[region.start : region.start + region.size] = data

    def copy_out(self, memory: NDArray[np.uint8]) -> None:
        """Keep what a launch has left in the global variables."""
        for region, data in zip(self.regions, self.variables.values(), strict=True):
            if region.writable:
                data[...] = memory[region.start : region.start + region.size]

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._kernels:
            raise KeyError(f"no kernel {name!r}; this module has {', '.join(self._kernels) or 'none'}")
        return self._kernels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kernels)

    def __len__(self) -> int:
        return len(self._kernels)
