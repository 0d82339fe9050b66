from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import check_float_tensor, check_tensor

_OP = "fused_linear"


def check_fused_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    gate: Tensor | None,
) -> None:
    check_float_tensor(_OP, "x", x)
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"{_OP}: x: expected shape [B, T, K > 0], got {list(x.shape)}")
    batch, tokens, depth = x.shape
    for name, layers in (("weights", weights), ("biases", biases)):
        if not isinstance(layers, Sequence):
            raise TypeError(f"{_OP}: {name}: expected a sequence of tensors, got {type(layers).__name__}")
        for each in layers:
            check_tensor(_OP, name, each)
    for name, extra in (("residual", residual), ("gate", gate)):
        if extra is not None:
            check_tensor(_OP, name, extra)
    if not weights or len(biases) not in (0, len(weights)):
        expected = f"none or {len(weights)}, of at least one weight"
        raise ValueError(f"{_OP}: biases: expected {expected}, got {len(biases)}")
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != depth:
            raise ValueError(f"{_OP}: weights: expected shape [N, {depth}], got {list(weight.shape)}")
    for bias, weight in zip(biases, weights, strict=False):
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{_OP}: biases: expected shape {list(weight.shape[:1])}, got {list(bias.shape)}"
            )
    width = sum(weight.shape[0] for weight in weights)
    if residual is not None and residual.shape != (batch, tokens, width):
        raise ValueError(
            f"{_OP}: residual: expected shape {[batch, tokens, width]}, got {list(residual.shape)}"
        )
    if gate is not None:
        if residual is None:
            raise ValueError(f"{_OP}: gate: expected None without a residual, got {list(gate.shape)}")
        if gate.dim() != 3 or gate.shape[0] != batch or gate.shape[2] != width:
            raise ValueError(f"{_OP}: gate: expected shape [{batch}, F, {width}], got {list(gate.shape)}")
        if gate.shape[1] == 0 or tokens % gate.shape[1]:
            raise ValueError(f"{_OP}: gate: expected frames that divide {tokens} tokens, got {gate.shape[1]}")
        if gate.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{_OP}: gate: expected {x.dtype} as x, or float32, got {gate.dtype}")
    groups = ("weights", weights), ("biases", biases), ("residual", (residual,)), ("gate", (gate,))
    for name, values in groups:
        for value in values:
            if value is None:
                continue
            if value.device != x.device:
                raise ValueError(f"{_OP}: {name}: expected device {x.device} as x, got {value.device}")
            if value.dtype != x.dtype and value is not gate:
                raise TypeError(f"{_OP}: {name}: expected {x.dtype} as x, got {value.dtype}")
