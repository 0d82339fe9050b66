"""Rounding to 8 bits has no gradient that anybody wants."""

from ..registration import register_no_derivative

register_no_derivative("quantize_rows", "modulated_norm_fp8")
