"""The product of FP8 rows with FP8 weights, by torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .rows import QuantizedRows

_ROW_WISE = functional.ScalingType.RowWise
_ON_CPUS = torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU")


def multiply_rows(rows: QuantizedRows, weight: QuantizedRows, bias: Tensor) -> Tensor:
    """x W^T + bias of a linear layer, by `torch.nn.functional.scaled_mm` with row-wise scales.

    Sums are in float32 throughout (`use_fast_accum=False`): Hopper's faster sums keep 14 bits of them.

    Args:
        rows: x, [B, T, K] and [B, T, 1]; K a multiple of 16.
        weight: W, [N, K] and [N, 1]; N a multiple of 16.
        bias: [N]; bfloat16 on a GPU, for torch writes nothing else there.

    Returns:
        [B, T, N] in bias' dtype.

    Raises:
        RuntimeError: on a CPU, for which torch 2.10 has no such product.
    """
    if rows.data.device.type == "cpu" and not _ON_CPUS:
        raise RuntimeError(f"multiply_rows: torch {torch.__version__} has no row-wise FP8 product on CPUs")
    shape = rows.data.shape
    out = functional.scaled_mm(
        rows.data.reshape(-1, shape[-1]),
        weight.data.t(),
        rows.scale.reshape(-1, 1),
        _ROW_WISE,
        weight.scale.t(),
        _ROW_WISE,
        bias=bias,
        output_dtype=bias.dtype,
    )
    return out.unflatten(0, shape[:-1])
