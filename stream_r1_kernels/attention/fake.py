"""Shapes and dtypes of the compiled attention ops, for tracing."""

import torch
from torch import Tensor

from . import shapes

torch.library.register_fake("stream_r1::cached_chunk_attention", shapes.outputs)
torch.library.register_fake("stream_r1::cached_chunk_attention_backward", shapes.gradients)
torch.library.register_fake("stream_r1::chunk_attention", shapes.outputs)


@torch.library.register_fake("stream_r1::chunk_attention_backward")
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return shapes.gradients(grad_out, None, q, k, v)


@torch.library.register_fake("stream_r1::renew_sink_")
def _(*_: object) -> None:
    return None
