"""Shapes and dtypes of the compiled rotary ops, for tracing."""

from typing import Any

from torch import Tensor

from ..registration import register_fake


@register_fake("qk_norm_rotary")
def _both(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    *_: object,
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = q.shape
    split = (batch, tokens, num_heads, width // num_heads)
    return q.new_empty(split), k.new_empty(split)


@register_fake("qk_norm_rotary_into")
def _(*arguments: Any) -> Tensor:
    return _both(*arguments)[0]


@register_fake("qk_norm_rotary_backward")
def _(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *_: object
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, q_weight, k_weight))
