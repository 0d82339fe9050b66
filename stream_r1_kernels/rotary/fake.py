"""Shapes and dtypes of the compiled rotary ops, for tracing."""

import torch
from torch import Tensor


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, width = x.shape
    return x.new_empty((batch, tokens, num_heads, width // num_heads))


@torch.library.register_fake("stream_r1::qk_norm_rotary")
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _split_heads(q, num_heads), _split_heads(k, num_heads)


@torch.library.register_fake("stream_r1::qk_norm_rotary_into")
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
    k_out: Tensor,
) -> Tensor:
    return _split_heads(q, num_heads)


@torch.library.register_fake("stream_r1::qk_norm_rotary_backward")
def _(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        q_weight.new_empty(q_weight.shape),
        k_weight.new_empty(k_weight.shape),
    )
