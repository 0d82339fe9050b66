"""What a streaming cache does with its sink once a chunk, in plain torch."""

from __future__ import annotations

from torch import Tensor

from .rotary import apply_rotary


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
) -> None:
    """Average an evicted chunk into the kept sink, then write the sink that is seen next.

    Args:
        storage: keys and values [L, 2, B, T, H, D]; tokens [0, S) are the sink that is seen.
        sink_k, sink_v: the sink at its own frames, [L, B, S, H, D]; values are kept where they are averaged.
        slot: first token of the evicted chunk.
        ema: share of the kept sink in the average; None: nothing is averaged.
        first: the sink's frames still lie in `storage` alone.
        evicted_cos, evicted_sin: [D / 2], turn the evicted keys to the sink's frames.
        window_cos, window_sin: [D / 2], turn the sink's keys to the window; None: they stay.
    """
    tokens = sink_k.shape[2]
    for layer in range(len(storage)):  # a layer at a time: the float32 temporaries stay small
        k, v = storage[layer, 0], storage[layer, 1]
        kept_k, visible_k = sink_k[layer], k[:, :tokens]
        if first:
            kept_k.copy_(visible_k)
        if sink_v is not None and ema is not None:
            kept_v, visible_v = sink_v[layer], v[:, :tokens]
            if first:
                kept_v.copy_(visible_v)
            evicted_k = apply_rotary(k[:, slot : slot + tokens].to(kept_k.dtype), evicted_cos, evicted_sin)
            kept_k.mul_(ema).add_(evicted_k, alpha=1 - ema)
            kept_v.mul_(ema).add_(v[:, slot : slot + tokens], alpha=1 - ema)
            visible_v.copy_(kept_v)
        # Always from the kept sink, not from the last copy: a thousand small turns in bfloat16 would wear
        # it out.
        if window_cos is not None and window_sin is not None:
            visible_k.copy_(apply_rotary(kept_k, window_cos, window_sin))
        else:
            visible_k.copy_(kept_k)
