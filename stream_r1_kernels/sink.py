"""What a streaming cache keeps of its sink, and does with it once a chunk, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .rotary import apply_rotary


def kept_sink(
    sink: Tensor, ema: float | None, *, turns: bool, moves: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Room for keys and values of the sink at its own frames; None for what a chunk sees as it is kept.

    Args:
        sink: its keys in the buffer, [L, B, S, H, D].
        ema: share of the kept sink in a moving average, which is kept in at least float32; None: none.
        turns: its keys are rotated in time.
        moves: it changes its place in the buffer.
    """
    dtype = sink.dtype if ema is None else torch.promote_types(sink.dtype, torch.float32)
    k = torch.zeros(sink.shape, dtype=dtype, device=sink.device)
    if ema is not None or moves:
        return k, torch.zeros_like(k)
    return (k, None) if turns else (None, None)


def renew_sink_(
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
    place: int = 0,
) -> None:
    """Average an evicted chunk into the kept sink, then write the sink that is seen next.

    Args:
        storage: keys and values [L, 2, B, T, H, D]; tokens [0, S) are the sink that is seen.
        sink_k, sink_v: the sink at its own frames, [L, B, S, H, D]; values where they are averaged or move.
        slot: first token of the evicted chunk.
        ema: share of the kept sink in the average; None: nothing is averaged.
        first: the sink's frames still lie in `storage` alone.
        evicted_cos, evicted_sin: [D / 2], turn the evicted keys to the sink's frames.
        window_cos, window_sin: [D / 2], turn the sink's keys to the window; None: they stay.
        place: token from which on the sink is seen.
    """
    tokens = sink_k.shape[2]
    for layer in range(len(storage)):  # a layer at a time: the float32 temporaries stay small
        k, v = storage[layer, 0], storage[layer, 1]
        kept_k, visible_k = sink_k[layer], k[:, place : place + tokens]
        if first:
            kept_k.copy_(k[:, :tokens])
        if sink_v is not None:
            kept_v = sink_v[layer]
            if first:
                kept_v.copy_(v[:, :tokens])
            if ema is not None:
                evicted = k[:, slot : slot + tokens].to(kept_k.dtype)
                kept_k.mul_(ema).add_(apply_rotary(evicted, evicted_cos, evicted_sin), alpha=1 - ema)
                kept_v.mul_(ema).add_(v[:, slot : slot + tokens], alpha=1 - ema)
            v[:, place : place + tokens].copy_(kept_v)
        # Always from the kept sink, not from the last copy: a thousand small turns in bfloat16 would wear
        # it out.
        if window_cos is not None and window_sin is not None:
            visible_k.copy_(apply_rotary(kept_k, window_cos, window_sin))
        else:
            visible_k.copy_(kept_k)
