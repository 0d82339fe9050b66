"""Flops of the attention ops, for torch's counter (`torch.utils.flop_counter`) and what else asks its table.

A product of matrices over a (query, key) pair of a head is 2 D flops: 2 products forward, 5 backward.
Formulas are given shapes where the op has tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .mask import count_pairs

_Shape = Sequence[int]


def _flops(q: _Shape, pairs: int, matmuls: int) -> int:
    batch, _tokens, heads, head_dim = q
    return 2 * matmuls * batch * heads * pairs * head_dim


def _dense(q: _Shape, keys: _Shape | None, matmuls: int) -> int:
    return 0 if keys is None else _flops(q, q[1] * keys[1], matmuls)


@register_flop_formula(torch.ops.stream_r1.cached_chunk_attention)
def cached(q: _Shape, k: _Shape | None, v: Any, past_k: _Shape | None, *_: Any, **__: Any) -> int:
    return _dense(q, k, 2) + _dense(q, past_k, 2)


@register_flop_formula(torch.ops.stream_r1.cached_chunk_attention_backward)
def cached_backward(
    grad_out: Any, grad_lse: Any, q: _Shape, k: _Shape, v: Any, past_k: _Shape | None, *_: Any, **__: Any
) -> int:
    return _dense(q, k, 5) + _dense(q, past_k, 3)  # the past gets no gradients


@register_flop_formula(torch.ops.stream_r1.chunk_attention)
def chunked(q: _Shape, k: Any, v: Any, table: Sequence[int], *_: Any, **__: Any) -> int:
    return _flops(q, count_pairs(table), 2)


@register_flop_formula(torch.ops.stream_r1.chunk_attention_backward)
def chunked_backward(
    grad_out: Any, q: _Shape, k: Any, v: Any, out: Any, lse: Any, table: Sequence[int], *_: Any, **__: Any
) -> int:
    return _flops(q, count_pairs(table), 5)
