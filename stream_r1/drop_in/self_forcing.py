"""Self-attention over the cache dictionaries of Self Forcing, on our ring buffer and kernels.

Self Forcing (2506.08009) and what grew out of it (Reward Forcing 2512.04678, Stream-R1 2605.03849) keep one
dictionary a layer: `k` and `v` [B, size, H, D], and the counters `global_end_index` and `local_end_index`.
A full cache is rolled to the left for every chunk, in every layer. After `adopt` the same dictionaries lie in
one `ChunkCache`: keys are rotated once, nothing is rolled, and no counter is read back from the device.
What `attend` and `self_attention` return is what the published attention returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stream_r1.models.module_weights import is_plain
from stream_r1_kernels import (
    ChunkCache,
    Past,
    RotaryGrid,
    apply_rotary,
    cached_chunk_attention,
    qk_norm_rotary,
)
from stream_r1_kernels.graphs import integers_may_change

KEY = "stream_r1"
"""Where a dictionary keeps what `adopt` added."""

CacheDict = dict[str, Any]

_NAMES = ("k", "v", "global_end_index", "local_end_index")


def adopt(
    kv_cache: Sequence[CacheDict],
    *,
    rows: int,
    columns: int,
    frames_per_chunk: int,
    window: bool = True,
    sink_frames: int = 0,
    positions: str = "absolute",
    ema: float | None = None,
    first_chunk_frames: int | None = None,
) -> ChunkCache:
    """Put one ring buffer behind a pipeline's cache dictionaries, in place.

    Each dictionary's `k` and `v` become views of the buffer (what they were is freed), the counters stay and
    continue counting. The order of tokens in `k` and `v` is the ring's from then on, and keys are rotated.

    Args:
        kv_cache: a dictionary a layer, none of a started stream. Batch, size, heads, head width, dtype and
            device are those of `k`; the size must be whole frames.
        rows, columns: tokens of a frame, as a grid: 30, 52 for 480x832.
        frames_per_chunk: latent frames denoised together (`num_frame_per_block`).
        window: True: the cache is a window that slides indefinitely (`local_attn_size` frames, the sink
            included); False: it holds the whole video (`local_attn_size = -1`).
        sink_frames: first frames that stay visible (`sink_size`).
        positions: "absolute" (Self Forcing) or "window" (Reward Forcing, Stream-R1).
        ema: decay of the sink's moving average, .999 in Reward Forcing; None: the sink stays.
        first_chunk_frames: 1 for an independent first frame.

    Returns:
        The cache, for those who want to look at it.

    Raises:
        ValueError: dictionaries that differ, hold frames already, or sizes that do not fit together.
    """
    if not isinstance(kv_cache, Sequence) or not kv_cache:
        got = "none" if isinstance(kv_cache, Sequence) else f"one {type(kv_cache).__name__}"
        raise ValueError(f"adopt: kv_cache: expected a dictionary a layer, got {got}")
    for index, entry in enumerate(kv_cache):
        missing = [name for name in _NAMES if name not in entry]
        if missing:
            raise ValueError(
                f"adopt: kv_cache[{index}]: expected {', '.join(_NAMES)}, got none of the name {missing[0]}"
            )
    first = kv_cache[0]["k"]
    if first.dim() != 4:
        raise ValueError(
            f"adopt: kv_cache[0]['k']: expected [B, size, heads, width], got {tuple(first.shape)}"
        )
    for index, entry in enumerate(kv_cache):
        for name in ("k", "v"):
            if entry[name].shape != first.shape or entry[name].dtype != first.dtype:
                raise ValueError(
                    f"adopt: kv_cache[{index}][{name!r}]: expected {first.dtype} {tuple(first.shape)} as in "
                    f"the first layer, got {entry[name].dtype} {tuple(entry[name].shape)}"
                )
        if (end := int(entry["global_end_index"])) != 0:
            raise ValueError(
                f"adopt: kv_cache[{index}]: expected a stream that has not begun, got global_end_index {end}"
            )
    batch, size, heads, width = first.shape
    if size % (rows * columns):
        raise ValueError(
            f"adopt: kv_cache: expected whole frames of {rows} x {columns} tokens, got room for {size} tokens"
        )
    frames = size // (rows * columns)
    cache = ChunkCache(
        len(kv_cache),
        batch,
        heads,
        RotaryGrid(width),
        rows,
        columns,
        frames_per_chunk,
        window_frames=frames if window else None,
        sink_frames=sink_frames if window else 0,
        positions=positions,
        ema=ema,
        max_frames=None if window else frames,
        first_chunk_frames=first_chunk_frames,
        dtype=first.dtype,
        device=first.device,
    )
    stream = _Stream(cache)
    for layer, entry in enumerate(kv_cache):
        entry["k"], entry["v"] = cache.storage[layer, 0, :, :size], cache.storage[layer, 1, :, :size]
        entry[KEY] = (stream, layer)
    return cache


def self_attention(attn: nn.Module, x: Tensor, kv_cache: CacheDict, current_start: int) -> Tensor:
    """What the published causal self-attention makes of `x` where it is given a cache.

    Args:
        attn: a module with the linear layers `q`, `k`, `v`, `o`, RMSNorms `norm_q`, `norm_k` over the full
            width (`weight`, `eps`) and `num_heads`.
        x: [B, T, C], the modulated tokens of the chunk.
        kv_cache, current_start: as for `attend`.

    Returns:
        [B, T, C].

    Raises:
        ValueError: as `attend`.
    """
    parts: Any = attn
    heads, q_weight, k_weight = parts.num_heads, parts.norm_q.weight, parts.norm_k.weight
    q, k, v = parts.q(x), parts.k(x), parts.v(x).unflatten(-1, (heads, -1))

    def rotate(cos: Tensor, sin: Tensor, k_out: Tensor | None) -> tuple[Tensor, Tensor]:
        if is_plain(parts.norm_q, parts.norm_k):
            return qk_norm_rotary(
                q, k, q_weight, k_weight, cos, sin, num_heads=heads, eps=parts.norm_q.eps, k_out=k_out
            )
        normed_q, normed_k = (x.unflatten(-1, (heads, -1)) for x in (parts.norm_q(q), parts.norm_k(k)))
        rotated = apply_rotary(normed_k, cos, sin)
        return apply_rotary(normed_q, cos, sin), rotated if k_out is None else k_out.copy_(rotated)

    learns = any(tensor.requires_grad for tensor in (q, k, v, q_weight, k_weight))
    return parts.o(_attend(rotate, v, learns, kv_cache, current_start).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, kv_cache: CacheDict, current_start: int) -> Tensor:
    """Attention of one chunk to what its dictionary's stream shows it, itself included.

    Where nothing requires grad, the chunk's keys and values are written to their slot; its last such pass is
    what later chunks see. Where q, k or v do, the cache is only read: they get gradients, earlier chunks get
    none.

    Args:
        q, k, v: [B, T, H, D], normalised and not rotated; a chunk's tokens, T whole frames.
        kv_cache: the layer's dictionary, after `adopt`.
        current_start: index of the chunk's first token in the video. The same one is another pass over the
            chunk, the one after the chunk begins the next; 0 with the counters at 0 is a new stream.

    Returns:
        [B, T, H, D].

    Raises:
        ValueError: a dictionary that was not adopted, another `current_start`, a chunk that was left without
            a pass that keeps its keys, or one computed again (gradient checkpointing) whose window is gone.
    """

    def rotate(cos: Tensor, sin: Tensor, k_out: Tensor | None) -> tuple[Tensor, Tensor]:
        rotated = apply_rotary(k, cos, sin)
        return apply_rotary(q, cos, sin), rotated if k_out is None else k_out.copy_(rotated)

    return _attend(rotate, v, any(x.requires_grad for x in (q, k, v)), kv_cache, current_start)


_Rotate = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


@integers_may_change
def _attend(rotate: _Rotate, v: Tensor, learns: bool, kv_cache: CacheDict, current_start: int) -> Tensor:
    """`rotate` makes q and k of phases cos and sin, k in the buffer that it is given."""
    if KEY not in kv_cache:
        raise ValueError("attend: kv_cache: expected a dictionary that adopt() was given, got another one")
    stream, index = kv_cache[KEY]
    cache, layer = stream.cache, stream.cache[index]
    expected = (cache.storage.shape[2], *cache.storage.shape[4:])
    if v.dim() != 4 or (v.shape[0], *v.shape[2:]) != expected:
        batch, heads, width = expected
        raise ValueError(
            f"attend: q, k, v: expected [{batch}, T, {heads}, {width}] as in the cache, got {list(v.shape)}"
        )
    learns = learns and torch.is_grad_enabled()
    if stream.enter(kv_cache, current_start, v.shape[1], learns):
        past, (cos, sin) = stream.earlier(index, current_start, v.shape[1])
        q, k = rotate(cos, sin, None)
        return cached_chunk_attention(q, k, v, past)

    end = current_start + v.shape[1]
    if cache.moments.recomputed() is None:
        _count(kv_cache, "global_end_index", end)
        _count(kv_cache, "local_end_index", min(end, cache.capacity * cache.tokens_per_frame))
    cos, sin = cache.positions()
    if learns:
        q, k = rotate(cos, sin, None)
        return cached_chunk_attention(q, k, v, layer.past(holds_fresh=False, copy=cache.overwrites))
    if torch.compiler.is_compiling():
        q, k = rotate(cos, sin, None)
        layer.write(k, v)
    else:
        slot_k, slot_v = layer.slot()
        q, _ = rotate(cos, sin, slot_k)
        slot_v.copy_(v)
    stream.kept, stream.written = True, cache.moments.now()
    return cached_chunk_attention(q, None, None, layer.past(holds_fresh=True))


def _count(kv_cache: CacheDict, name: str, value: int) -> None:
    """Set a counter: a tensor in place, as published, or an int, as some forks have it."""
    if isinstance(kv_cache[name], Tensor):
        kv_cache[name].fill_(value)
    else:
        kv_cache[name] = value


class _Stream:
    """Where the layers' stream is; told by `current_start`, a host integer, alone."""

    def __init__(self, cache: ChunkCache) -> None:
        self.cache = cache
        self.kept = False  # whether a pass without gradients has written the chunk that is open
        self.written = cache.moments.now()  # when the last such pass was

    def enter(self, kv_cache: CacheDict, start: int, tokens: int, learns: bool) -> bool:
        """Go to the chunk at token `start`; True where it is an earlier one, computed again in a backward."""
        cache = self.cache
        here = cache.next_frame * cache.tokens_per_frame
        chunk = cache.frames * cache.tokens_per_frame
        if (again := cache.moments.recomputed()) is not None:
            if again == "other stream" or start > here:
                raise ValueError(
                    f"attend: current_start {start}: gradient checkpointing computes this chunk again, but a "
                    "new stream has begun since; run the backward pass before it"
                )
            return again != "chunk" or start != here
        if cache.open and start == here + chunk:
            if not self.kept:
                raise ValueError(
                    f"attend: current_start {start}: no pass without gradients has kept the chunk at {here}; "
                    "run its last pass under torch.no_grad()"
                )
            cache.commit()
            cache.moments.end_chunk(self.written)  # this call may be within a checkpoint of the next chunk
            self.kept = False
        elif start != here:
            if start == 0 and int(kv_cache["global_end_index"]) == 0:
                cache.reset()
                cache.moments.begin_stream(self.written)
                self.kept = False
            elif start < here and learns:
                return True
            else:
                raise ValueError(
                    f"attend: current_start: expected {here} (another pass), {here + chunk} (the next chunk) "
                    f"or 0 with global_end_index 0 (a new stream), got {start}"
                )
        if tokens != cache.frames * cache.tokens_per_frame:
            raise ValueError(
                f"attend: q, k, v: expected a chunk of {cache.frames} frames of {cache.tokens_per_frame} "
                f"tokens, got {tokens} tokens"
            )
        cache.begin_chunk()
        return False

    def earlier(self, layer: int, start: int, tokens: int) -> tuple[Past | None, tuple[Tensor, Tensor]]:
        """What an earlier chunk saw before itself, and its phases."""
        cache = self.cache
        if cache.overwrites:
            raise ValueError(
                f"attend: current_start {start}: gradient checkpointing computes this chunk again, but the "
                "window has moved on; turn it off, or adopt the cache with window=False"
            )
        frame = cache.tokens_per_frame
        phases = cache.rotary.phases(
            start // frame, tokens // frame, cache.rows, cache.columns, cache.storage.device
        )
        if start == 0:
            return None, phases
        return Past(*cache.tracked.view(layer, cache.storage[layer], 0, start), False), phases
