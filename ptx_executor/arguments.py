"""Arguments of a launch: the bytes of its parameters, and the memory that its pointers reach."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dtypes import is_float
from .errors import LaunchError
from .memory import GLOBAL_BASE, Region, round_up
from .program import Variable

_ALIGNMENT = 256


@dataclass(frozen=True)
class Pointer:
    """The address of byte `offset` of an array or tensor; the kernel may reach all of it, before and
    behind.
    """

    array: Any
    offset: int = 0


class _Span(NamedTuple):
    """Host memory that an array reaches: `[low, high)`, within the allocation that starts at `root`."""

    name: str
    low: int
    high: int
    root: int
    writable: bool
    order: int = 0


def _span(value: Any, name: str) -> _Span | None:
    """The memory of a numpy array or of a tensor on the CPU; `None` for anything else.

    A view reaches from its first to its last element, and keeps its place in the allocation: a pointer that
    is not aligned on a GPU, where allocations are multiples of 256, is not aligned here.
    """
    if isinstance(value, Pointer):
        return _span(value.array, name)
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise LaunchError(f"{name}: expected an array of numbers, got one of {value.dtype}")
        low, high = np.lib.array_utils.byte_bounds(value)
        root: Any = value
        while isinstance(root.base, np.ndarray):
            root = root.base
        start = root.__array_interface__["data"][0]
        return _Span(name, low, high if value.size else low, start, value.flags.writeable)
    if hasattr(value, "data_ptr") and hasattr(value, "untyped_storage"):
        if value.device.type != "cpu" or str(value.layout) != "torch.strided":
            raise LaunchError(
                f"{name}: expected a strided tensor on the CPU, got one on {value.device}, {value.layout}"
            )
        reach = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
        low = value.data_ptr()
        high = low + (reach * value.element_size() if value.numel() else 0)
        return _Span(name, low, high, value.untyped_storage().data_ptr(), True)
    return None


def _host_bytes(low: int, high: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))


class Arguments:
    """Arguments laid out for one launch.

    Args:
        values: one for each parameter: an array or CPU tensor (its address), `None` (a null pointer), a
            number, `bytes`, or a tuple of these, which is a struct with C's alignment. Python's own numbers
            are converted to the type of a scalar parameter; a float for an integer is refused.
        parameters: the parameters of the kernel.
        start: first free byte of global memory.

    Attributes:
        regions: the global memory that the pointers may reach.
        bytes: the parameters as the kernel reads them.
    """

    def __init__(self, values: list[Any], parameters: list[Variable], start: int) -> None:
        if len(values) != len(parameters):
            raise LaunchError(f"expected {len(parameters)} arguments, got {len(values)}")
        spans: list[_Span] = []
        for i, value in enumerate(values):
            self._collect(value, f"argument {i}", spans)
        self._keep = values
        self.regions: list[Region] = []
        self._places: list[tuple[_Span, Region]] = []
        self._map(spans, start)
        end = parameter_offsets(parameters)
        self.bytes = np.zeros(max(end[-1], 16), np.uint8)
        for i, (value, parameter, offset) in enumerate(zip(values, parameters, end, strict=False)):
            data = self._encode(value, parameter, f"argument {i}")
            self.bytes[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def _collect(self, value: Any, name: str, spans: list[_Span]) -> None:
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                self._collect(item, f"{name}.{i}", spans)
        elif (span := _span(value, name)) is not None:
            spans.append(span._replace(order=len(spans)))

    def _map(self, spans: list[_Span], cursor: int) -> None:
        """Give each stretch of host memory a place; arrays that overlap share theirs."""
        merged: list[_Span] = []
        for span in sorted(spans, key=lambda s: (s.low, s.high)):
            if merged and span.low < merged[-1].high:
                last = merged[-1]
                name = last.name if span.high <= last.high else f"{last.name} and {span.name}"
                writable = last.writable and span.writable
                high, order = max(last.high, span.high), min(last.order, span.order)
                merged[-1] = last._replace(high=high, writable=writable, name=name, order=order)
            elif not merged or span[1:4] != merged[-1][1:4]:
                merged.append(span)
        # In the order of the arguments: addresses do not depend on where the host keeps them.
        for span in sorted(merged, key=lambda each: each.order):
            first = round_up(cursor, _ALIGNMENT) + _ALIGNMENT + (span.low - span.root) % _ALIGNMENT
            region = Region(span.name, first, span.high - span.low, span.writable)
            self.regions.append(region)
            self._places.append((span, region))
            cursor = region.start + region.size

    def _address(self, own: _Span) -> int:
        """Where the kernel finds an array. An empty one has a place of its own, that nothing may touch."""
        for span, region in self._places:
            if (
                span.low <= own.low
                and own.high <= span.high
                and (own.low < own.high) == (span.low < span.high)
            ):
                return GLOBAL_BASE + region.start + own.low - span.low
        raise AssertionError("an argument without memory")

    def _encode(self, value: Any, parameter: Variable, name: str) -> bytes:
        assert parameter.size is not None
        if isinstance(value, tuple):
            data = self._struct(value, name)[0]
            data += bytes(-len(data) % parameter.align)
        else:
            data = self._scalar(_as_type(value, parameter, name), parameter.size, name)
        if len(data) != parameter.size:
            raise LaunchError(f"{name}: {parameter.name} has {parameter.size} bytes, got {len(data)} bytes")
        return data

    def _struct(self, fields: tuple[Any, ...], name: str) -> tuple[bytes, int]:
        data, largest = b"", 1
        for i, item in enumerate(fields):
            if isinstance(item, tuple):
                part, align = self._struct(item, f"{name}.{i}")
            else:
                part = self._scalar(item, 4, f"{name}.{i}")
                align = min(len(part), 16)
            data += bytes(-len(data) % align) + part
            largest = max(largest, align)
        return data + bytes(-len(data) % largest), largest

    def _scalar(self, value: Any, size: int, name: str) -> bytes:
        """Bytes of a value; Python's own numbers take `size` bytes."""
        if isinstance(value, bytes):
            return value
        if value is None:
            return bytes(8)
        if (span := _span(value, name)) is not None:
            offset = value.offset if isinstance(value, Pointer) else 0
            return (self._address(span) + offset).to_bytes(8, "little")
        if isinstance(value, np.generic):
            return value.tobytes()
        if isinstance(value, bool | int):
            if not -(1 << 8 * size - 1) <= value < 1 << 8 * size:
                raise LaunchError(f"{name}: {value} does not fit {size} bytes")
            return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        if isinstance(value, float) and size in (4, 8):
            return np.array(value, f"f{size}").tobytes()
        raise LaunchError(
            f"{name}: expected an array, a number, bytes or a tuple of these, got {type(value).__name__}"
        )

    def copy_in(self, memory: NDArray[np.uint8]) -> None:
        for span, region in self._places:
            memory[region.start : region.start + region.size] = _host_bytes(span.low, span.high)

    def copy_out(self, memory: NDArray[np.uint8]) -> None:
        for span, region in self._places:
            if span.writable:
                _host_bytes(span.low, span.high)[...] = memory[region.start : region.start + region.size]


def _as_type(value: Any, parameter: Variable, name: str) -> Any:
    """Python's own numbers as C converts them; bits of one kind are no number of the other."""
    if parameter.type and is_float(parameter.type):
        return float(value) if isinstance(value, bool | int) else value
    if isinstance(value, float) and parameter.type[:1] in ("u", "s"):
        raise LaunchError(
            f"{name}: {parameter.name} is an integer of type .{parameter.type}, got the float {value}"
        )
    return value


def parameter_offsets(parameters: list[Variable]) -> list[int]:
    """Byte offset of every parameter, and then the size of all of them."""
    offsets, end = [], 0
    for parameter in parameters:
        end = round_up(end, parameter.align)
        offsets.append(end)
        assert parameter.size is not None
        end += parameter.size
    return [*offsets, end]
