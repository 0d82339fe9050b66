"""What the ops expect of their arguments, whatever the op. Errors name the parameter and say what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {_kind(value)}")


def check_float_tensor(op: str, name: str, value: Any) -> None:
    check_tensor(op, name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")


def check_number(op: str, name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> None:
    """`fits` says whether a number is one that is expected; NaN has to fail it."""
    try:
        fitting = fits(value)
    except TypeError:
        raise TypeError(f"{op}: {name}: expected {expected}, got {value!r}") from None
    if not fitting:
        raise ValueError(f"{op}: {name}: expected {expected}, got {value}")


def check_finite(op: str, name: str, value: Any) -> None:
    # not math.isfinite: a compiled graph can't ask it of a number that varies
    check_number(op, name, value, "a finite number", lambda number: -math.inf < number < math.inf)


def check_eps(op: str, eps: Any) -> None:
    check_number(op, "eps", eps, "a number >= 0", lambda value: 0 <= value < math.inf)


def check_integer(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name}: expected an integer, got {value!r}")


# Asked here, for graphs of torch 2.10 can't ask.
_WITH_AUTOCAST = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")
    if torch.amp.is_autocast_available(device)
)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """For references: autocast leaves the ops alone, which compute in at least float32 under it too."""
    device = tensor.device.type
    if device in _WITH_AUTOCAST and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def count_write(x: Tensor) -> None:
    """Tell autograd that an op has written to x. A write that the op has told itself may be told again."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(x)
