import torch
from torch import Tensor

from ..arguments import check_float_tensor
from ..backends import resolve
from ..norm.validation import check_modulated_norm
from ..registration import kernels
from .reference import modulated_norm_fp8_reference, quantize_rows_reference
from .rows import QuantizedRows


def quantize_rows(x: Tensor, *, gelu: bool = False, backend: str = "auto") -> QuantizedRows:
    """x, or its GELU, in FP8 with a scale a row: what a linear layer in FP8 reads.

    A row's scale is its largest magnitude / 448; numbers are divided by it in float32 and rounded to nearest,
    ties to even. The activation is not rounded in between.

    Args:
        x: [B, T, K], K > 0; float32, bfloat16, float16 or float64.
        gelu: quantise GELU(x), in its tanh approximation.
        backend: "auto", "cuda" or "reference"; an explicit choice never falls back.

    Returns:
        `QuantizedRows`, [B, T, K] and [B, T, 1].

    Raises:
        ValueError: a shape that does not fit, or autograd would record the call: there is no backward.
        TypeError: a dtype that is not allowed.
    """
    check_float_tensor("quantize_rows", "x", x)
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"quantize_rows: x: expected shape [B, T, K > 0], got {list(x.shape)}")
    _refuse_grad("quantize_rows", x)
    if resolve(backend, "quantize_rows", x) == "reference":
        return quantize_rows_reference(x, gelu)
    return QuantizedRows(*kernels(x).quantize_rows.default(x, gelu))


def modulated_norm_fp8(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> QuantizedRows:
    """`modulated_norm` whose rows are quantised as they are made, as `quantize_rows` would.

    Args:
        x, shift, scale, eps: as for `modulated_norm`.
        backend: as for `quantize_rows`.

    Returns:
        `QuantizedRows`, [B, T, D] and [B, T, 1].

    Raises:
        ValueError, TypeError: as for `modulated_norm` and `quantize_rows`.
    """
    check_modulated_norm(x, shift, scale, eps)
    _refuse_grad("modulated_norm_fp8", x, shift, scale)
    if resolve(backend, "modulated_norm_fp8", x, shift, scale) == "reference":
        return modulated_norm_fp8_reference(x, shift, scale, eps)
    return QuantizedRows(*kernels(x, shift, scale).modulated_norm_fp8.default(x, shift, scale, eps))


def _refuse_grad(op: str, *inputs: Tensor) -> None:
    """The references would have a gradient, as if nothing were rounded."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise ValueError(f"{op}: has no backward: expected a call under torch.no_grad(), got one with grad")
