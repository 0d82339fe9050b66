"""Shape and dtype of the compiled op, for tracing, its flops, for torch's counter, and vmap."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..registration import register_fake


@register_fake("fused_linear")
def _(x: Tensor, weights: Sequence[Tensor], *_: object) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], sum(weight.shape[0] for weight in weights))


@register_flop_formula(torch.ops.stream_r1.fused_linear)
def _matmuls(x_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * int(out_shape.numel()) * int(x_shape[2])


@torch.library.register_vmap("stream_r1::fused_linear")
def _once_a_sample(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    """As torch does of itself for ops without lists of tensors."""

    def sample(value: Any, dims: Any, index: int) -> Any:
        if isinstance(value, list | tuple):
            return [sample(*each, index) for each in zip(value, dims or [None] * len(value), strict=True)]
        return value if dims is None else value.select(dims, index)

    outs = [
        torch.ops.stream_r1.fused_linear(
            *(sample(value, dims, index) for value, dims in zip(arguments, in_dims, strict=True))
        )
        for index in range(info.batch_size)
    ]
    return torch.stack(outs), 0
