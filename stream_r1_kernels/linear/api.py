from collections.abc import Sequence

from torch import Tensor

from ..arguments import without_autocast
from ..backends import resolve
from ..registration import kernels
from .reference import fused_linear_reference
from .validation import check_fused_linear


def fused_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear layers that read the same x, side by side, and what follows them: y = act(x W^T + bias), or
    residual + y * gate.

    Sums and what follows are in float32 whatever the dtypes (float64 for float64), rounded once; the
    reference rounds what torch's linear layer gives to x's dtype first, but for float16 on a CPU.

    Args:
        x: [B, T, K]; float32, bfloat16, float16 or float64.
        weights: [N, K] each, N may differ, as nn.Linear keeps them; x's dtype.
        biases: [N] each, x's dtype; or none at all.
        gelu: act is GELU in its tanh approximation; else nothing.
        residual: [B, T, sum of N], x's dtype.
        gate: [B, F, sum of N] with F dividing T (1 <= F <= T), the tokens of F frames one frame after the
            other; x's dtype or float32, any strides. None: 1.
        backend: "auto", "cpu" or "reference"; an explicit choice never falls back. The compiled op has no
            backward: where autograd records, auto takes the reference.

    Returns:
        [B, T, sum of N] in x's dtype, contiguous. Differentiable in everything.

    Raises:
        ValueError: a shape that does not fit, or grad for a backend without.
        TypeError: a dtype that is not allowed, or no sequence of tensors.
    """
    check_fused_linear(x, weights, biases, residual, gate)
    if resolve(backend, "fused_linear", x, *weights, *biases, residual, gate) == "reference":
        with without_autocast(x):
            return fused_linear_reference(x, weights, biases, gelu, residual, gate)
    ops = kernels(x, *weights, *biases, residual, gate)
    return ops.fused_linear.default(x, weights, biases, gelu, residual, gate)
