"""The names that compiled segments may use."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arithmetic, conversions, dtypes, matrices, warps

_NUMPY = (
    "absolute", "add", "bitwise_and", "bitwise_or", "bitwise_xor", "copysign", "copyto", "cos", "divide",
    "equal", "exp2", "flatnonzero", "fmax", "fmin", "greater", "greater_equal", "invert", "left_shift",
    "less", "less_equal", "log2", "maximum", "minimum", "multiply", "negative", "not_equal", "repeat",
    "right_shift", "sin", "sqrt", "subtract", "uint16", "uint32", "where", "zeros",
)  # fmt: skip

NAMESPACE: dict[str, Any] = {
    **{name: getattr(np, name) for name in _NUMPY},
    **{
        name: value
        for module in (arithmetic, conversions, matrices, warps)
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    },
    "widen_bf16": dtypes.bf16_to_f32,
}
