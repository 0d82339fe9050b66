"""Rows of numbers in FP8."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of float8_e4m3fn, which has no infinity
LEAST = 2.0**-96  # of a row's largest magnitude; below it numbers become 0, and 448 / it is still finite


class QuantizedRows(NamedTuple):
    """Rows along the last dimension, each with a scale of its own: row = data * scale.

    Attributes:
        data: float8_e4m3fn, [..., K].
        scale: float32, [..., 1]: the row's largest magnitude / 448.
    """

    data: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """data * scale [..., K], multiplied in float32 and rounded once to `dtype`."""
        return (self.data.float() * self.scale).to(dtype)
