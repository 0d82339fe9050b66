"""Plain torch: what `fused_linear` means."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..norm.reference import gated_add_reference


def fused_linear_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gelu: bool,
    residual: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """x [B, T, K], weights [N, K] each, biases [N] each: act(x W^T + bias), residual + that * gate."""
    dtype = x.dtype
    # a sum may leave float16's range; and for CPUs it is the quicker way
    if dtype == torch.float16 and x.device.type == "cpu":
        x, weights, biases = x.float(), [w.float() for w in weights], [b.float() for b in biases]
    each_bias = biases if biases else [None] * len(weights)
    outs = [functional.linear(x, weight, bias) for weight, bias in zip(weights, each_bias, strict=True)]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
    if gelu:
        out = functional.gelu(out, approximate="tanh")
    if gate is not None:
        out = gated_add_reference(torch.zeros_like(out) if residual is None else residual, out, gate)
    elif residual is not None:
        out = residual + out
    return out.to(dtype)
