"""Shapes and dtypes of the compiled attention ops, for tracing."""

import torch
from torch import Tensor


def _forward(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)


def _backward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("stream_r1::cached_chunk_attention")
def _(
    q: Tensor, k: Tensor | None, v: Tensor | None, past_k: Tensor | None, past_v: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward(q)


@torch.library.register_fake("stream_r1::cached_chunk_attention_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(q, k, v)


@torch.library.register_fake("stream_r1::renew_sink_")
def _(
    storage: Tensor,
    sink_k: Tensor,
    sink_v: Tensor | None,
    slot: int,
    ema: float | None,
    first: bool,
    evicted_cos: Tensor,
    evicted_sin: Tensor,
    window_cos: Tensor | None,
    window_sin: Tensor | None,
) -> None:
    return None


@torch.library.register_fake("stream_r1::chunk_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    frames_per_chunk: int,
    window_frames: int | None,
    sink_frames: int,
    first_chunk_frames: int | None,
    teacher_forcing: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _forward(q)


@torch.library.register_fake("stream_r1::chunk_attention_backward")
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tokens_per_frame: int,
    frames_per_chunk: int,
    window_frames: int | None,
    sink_frames: int,
    first_chunk_frames: int | None,
    teacher_forcing: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(q, k, v)
