"""Rows in float8_e4m3fn with a scale each: what FP8 tensor cores multiply."""

from . import autograd, fake  # noqa: F401
from .api import modulated_norm_fp8, quantize_rows
from .product import multiply_rows
from .rows import QuantizedRows

__all__ = ["QuantizedRows", "modulated_norm_fp8", "multiply_rows", "quantize_rows"]
