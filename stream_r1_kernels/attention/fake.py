"""Shapes and dtypes of the compiled attention ops, for tracing."""

from torch import Tensor

from ..backends import device_type
from ..registration import register_fake
from . import (
    flops,  # noqa: F401  registers them
    shapes,
)


@register_fake("cached_chunk_attention")
@register_fake("chunk_attention")
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out, lse = shapes.outputs(q)
    return out, lse.double() if device_type(q) == "cpu" else lse


register_fake("cached_chunk_attention_backward")(shapes.gradients)


@register_fake("chunk_attention_backward")
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return shapes.gradients(grad_out, None, q, k, v)


@register_fake("renew_sink_")
def _(*_: object) -> None:
    return None
