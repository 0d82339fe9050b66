"""Shapes and dtypes of the compiled attention ops, for tracing."""

import torch
from torch import Tensor

from . import (
    flops,  # noqa: F401  registers them
    shapes,
)


@torch.library.register_fake("stream_r1::cached_chunk_attention")
@torch.library.register_fake("stream_r1::chunk_attention")
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out, lse = shapes.outputs(q)
    return out, lse.double() if q.device.type == "cpu" else lse


torch.library.register_fake("stream_r1::cached_chunk_attention_backward", shapes.gradients)


@torch.library.register_fake("stream_r1::chunk_attention_backward")
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return shapes.gradients(grad_out, None, q, k, v)


@torch.library.register_fake("stream_r1::renew_sink_")
def _(*_: object) -> None:
    return None
