from torch import Tensor

from ..backends import resolve
from ..registration import kernels
from .reference import (
    gated_add_reference,
    modulated_norm_reference,
    rms_norm_reference,
    rms_norm_silu_reference,
)
from .validation import check_gated_add, check_modulated_norm, check_rms_norm, check_rms_norm_silu


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """AdaLN with a modulation per frame, as in the Wan block: LN(x) * (1 + scale) + shift.

    LN is over the last dimension, without weights, in float32 whatever the dtypes (float64 for float64 x).

    Args:
        x: [B, T, D], the tokens of F frames one frame after the other; float32, bfloat16, float16 or float64.
        shift, scale: [B, F, D] with F dividing T (1 <= F <= T); x's dtype or float32. Any strides: they are
            usually slices of one [B, F, 6, D] tensor.
        eps: added to the variance, >= 0.
        backend: "auto", "cpu", "cuda" or "reference"; an explicit choice never falls back.

    Returns:
        [B, T, D] in x's dtype, contiguous. Differentiable in x, shift and scale.

    Raises:
        ValueError: a shape or eps that does not fit.
        TypeError: a dtype that is not allowed.
    """
    check_modulated_norm(x, shift, scale, eps)
    if resolve(backend, "modulated_norm", x) == "reference":
        return modulated_norm_reference(x, shift, scale, eps)
    return kernels(x, shift, scale).modulated_norm.default(x, shift, scale, eps)[0]


def gated_add(x: Tensor, y: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """The gated residual of the Wan block, x + y * gate, with a gate per frame; float32 inside, rounded once.

    Args:
        x: [B, T, D], the residual stream; float32, bfloat16, float16 or float64.
        y: [B, T, D], the branch; x's dtype, or bfloat16 / float16 beside a float32 x.
        gate: [B, F, D] with F dividing T (1 <= F <= T); y's dtype or float32; any strides.
        backend: "auto", "cpu", "cuda" or "reference"; an explicit choice never falls back.

    Returns:
        [B, T, D] in x's dtype, contiguous. Differentiable in x, y and gate.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that is not allowed.
    """
    check_gated_add(x, y, gate)
    if resolve(backend, "gated_add", x) == "reference":
        return gated_add_reference(x, y, gate)
    return kernels(x, y, gate).gated_add.default(x, y, gate)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """x / rms(x) * weight, the root mean square over the last dimension: of queries that are not rotated.

    In float32 whatever the dtypes (float64 for float64 x), rounded once.

    Args:
        x: [B, T, D]; float32, bfloat16, float16 or float64.
        weight: [D], any floating-point dtype.
        eps: added to the mean square, >= 0.
        backend: "auto", "cpu", "cuda" or "reference" (torch's own); an explicit choice never falls back. The
            compiled op has no backward: where autograd records, auto takes the reference.

    Returns:
        [B, T, D] in x's dtype. Differentiable in x and weight.

    Raises:
        ValueError: a shape or eps that does not fit, or grad for a backend without.
        TypeError: a dtype that is not allowed.
    """
    check_rms_norm("rms_norm", x, weight, eps)
    if resolve(backend, "rms_norm", x, weight) == "reference":
        return rms_norm_reference(x, weight, eps)
    return kernels(x, weight).rms_norm.default(x, weight, eps)


def rms_norm_silu(
    x: Tensor, weight: Tensor, before: Tensor | None = None, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """[before | silu(x / rms(x) * weight)]: norm and activation of a causal autoencoder's residual block.

    The root mean square is over the last dimension; all in float32 whatever the dtypes (float64 for float64
    x), rounded once. The rows of `before` are copied as they are: with the activations that a causal
    convolution kept of the piece before, the result is what it reads next, and nothing is concatenated.

    Args:
        x: [B, T, D], channels last; float32, bfloat16, float16 or float64.
        weight: [D], any floating-point dtype.
        before: [B, P, D] in x's dtype.
        eps: added to the mean square, >= 0.
        backend: "auto", "cpu", "cuda" or "reference"; an explicit choice never falls back.

    Returns:
        [B, P + T, D] in x's dtype, contiguous. Differentiable in x, weight and before.

    Raises:
        ValueError: a shape or eps that does not fit.
        TypeError: a dtype that is not allowed.
    """
    check_rms_norm_silu(x, weight, before, eps)
    if resolve(backend, "rms_norm_silu", x) == "reference":
        return rms_norm_silu_reference(x, weight, before, eps)
    return kernels(x, weight, before).rms_norm_silu.default(x, weight, before, eps)
