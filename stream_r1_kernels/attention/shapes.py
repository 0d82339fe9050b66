"""Shapes and dtypes of what the attention ops return, compiled or on Triton: what they do on fake tensors.

A function names the arguments that it reads; the rest are in the ops' schemas.
"""

import torch
from torch import Tensor


def outputs(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse [B, H, T]."""
    batch, tokens, heads, _head_dim = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)


def gradients(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
