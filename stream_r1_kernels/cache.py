"""The streaming cache: keys and values of past frames, one buffer a layer, `[sink | ring of chunk slots]`.

    frames      0 1 2 | 3 4 5   6 7 8              window 9 frames, 3 of them sink, chunks of 3
    buffer     [ sink | slot 0  slot 1 ]
    chunk 3:     0 1 2  9 A B   6 7 8              its keys and values land where 3 4 5 were: nothing moves
    chunk 4:     0 1 2  9 A B   C D E

Keys are rotated once, at their absolute frame. Attention does not care about the order of keys and rotary
phases only about differences, so what a chunk sees is one contiguous range of the buffer, itself included:
each pass is one dense attention without a mask, and keeping a chunk copies nothing. Only the sink may have to
move in time (positions="window"): its keys are turned by the temporal phase, once a chunk, to the frames just
before the window.

Sources: sink and window of StreamingLLM (2309.17453), the chunk cache of Self Forcing (2506.08009), the
moving average of the sink of Reward Forcing (2512.04678).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import FLOATS, check_integer
from .attention.past import Past
from .cache_reuse import Moments, TrackedViews
from .cache_sizes import layout_of
from .graphs import integers_may_change, renew_sinks_
from .layer_cache import LayerCache
from .rotary import RotaryGrid
from .sink import kept_sink


class ChunkCache:
    """Keys and values of the frames a stream can still see, for every layer, under one bookkeeping.

    A chunk's life: `begin_chunk()` makes room, each denoising pass writes its keys and values into
    `cache[layer].slot()` and attends to `cache[layer].past(holds_fresh=True)`, and after the pass whose keys
    and values shall stay `commit()`.
    Positions are host integers: nothing waits for the device, and memory never grows.
    Memory is used again. A backward pass over what `past()` handed out raises once a chunk was written there
    (after an eviction, or a `reset()`), and activation checkpointing that would read the cache again after it
    has moved on is refused. Code under torch.compile gets copies where gradients are on, but can't see that
    it is run again by a checkpoint around it: take `past()` outside of what is checkpointed.

    Args:
        layers, batch, heads: sizes; the head width is the rotary grid's.
        rotary: the grid that keys are rotated with.
        rows, columns: tokens of a frame, as a grid.
        frames_per_chunk: latent frames denoised together.
        window_frames: frames visible at once, sink and fresh chunk included, any number that has room for
            these; None: the whole past. Fastest where it is the sink and whole chunks.
        sink_frames: first frames that stay visible indefinitely, any number.
        positions: "absolute": keys stay at their frame; "window": the sink always lies just before the
            window.
        ema: keep the sink as a moving average, `sink = ema * sink + (1 - ema) * evicted chunk`, where every
            chunk is as long as the sink; None: leave it as it is.
        max_frames: room for a stream without a window, in frames. With a window, which streams
            indefinitely, it only says whether the stream `evicts`.
        first_chunk_frames: frames of the first chunk where it differs (1: independent first frame).
        dtype: of keys and values. A moving average is kept in float32: in bfloat16 an update of 0.1 % rounds
            away.

    Raises:
        ValueError: sizes that do not fit together; the message names them.
        TypeError: sizes that are no integers, a dtype that is not floating-point.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        rotary: RotaryGrid,
        rows: int,
        columns: int,
        frames_per_chunk: int,
        *,
        window_frames: int | None = None,
        sink_frames: int = 0,
        positions: str = "absolute",
        ema: float | None = None,
        max_frames: int | None = None,
        first_chunk_frames: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        first = frames_per_chunk if first_chunk_frames is None else first_chunk_frames
        if not isinstance(rotary, RotaryGrid):
            raise TypeError(f"ChunkCache: rotary: expected a RotaryGrid, got {rotary!r}")
        if dtype not in FLOATS:
            raise TypeError(
                f"ChunkCache: dtype: expected one of {', '.join(map(str, FLOATS))}, got {dtype!r}"
            )
        sizes = {"layers": layers, "batch": batch, "heads": heads, "rows": rows, "columns": columns}
        for name, size in sizes.items():
            check_integer("ChunkCache", name, size)
            least = 0 if name == "batch" else 1
            if size < least:
                raise ValueError(f"ChunkCache: {name} must be at least {least}, got {size}")
        self._layout = layout_of(
            frames_per_chunk, first, window_frames, sink_frames, positions, ema, max_frames
        )
        self.rotary = rotary
        self.rows, self.columns = rows, columns
        self.tokens_per_frame = rows * columns
        self.frames_per_chunk = frames_per_chunk
        self.first_chunk_frames = first
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.ema = ema
        self.moves_sink = positions == "window"
        self.capacity = self._layout.capacity
        self.evicts = window_frames is not None and (max_frames is None or max_frames > window_frames)

        tokens = (self.capacity + self._layout.spare) * self.tokens_per_frame
        shape = (layers, 2, batch, tokens, heads, rotary.head_dim)
        with torch.inference_mode(False):  # else no other mode could write there
            self.storage = self._allocate(shape, dtype, device)
            self._sink_k, self._sink_v = self._keep_sink()
        self._pinned: tuple[Tensor, Tensor] | None = None
        self._views: dict[int, tuple[Tensor, Tensor, Past]] = {}  # by layer, of the chunk under way
        self.tracked = TrackedViews(layers)
        self.moments = Moments()
        self.reset()

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
        # Zeros, not empty: what has not been written must never be a NaN in somebody's sum.
        return torch.zeros(shape, dtype=dtype, device=device)

    def _keep_sink(self) -> tuple[Tensor | None, Tensor | None]:
        """Where the sink is kept at its own frames, if its copy in the buffer is another."""
        if self.window_frames is None or self.sink_frames == 0:
            return None, None
        sink = self.storage[:, 0, :, : self.sink_frames * self.tokens_per_frame]
        return kept_sink(sink, self.ema, turns=self.moves_sink, moves=self._layout.spare > 0)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: their views are made again, in their own buffer."""
        return self.__dict__ | {"_views": {}, "tracked": TrackedViews(len(self)), "moments": Moments()}

    def __len__(self) -> int:
        return self.storage.shape[0]

    def __getitem__(self, layer: int) -> LayerCache:
        if isinstance(layer, slice):
            raise TypeError(f"ChunkCache: layer: expected an integer, got {layer}")
        if torch.compiler.is_compiling():  # a range takes no integer of a graph
            return self._of(layer + len(self) if layer < 0 else layer)
        return self._of(range(len(self))[layer])

    @property
    def layers(self) -> list[LayerCache]:
        """All layers' parts; made again: a cache that held them would outlive its last user."""
        return [self._of(layer) for layer in range(len(self))]

    def _of(self, layer: int) -> LayerCache:
        return LayerCache(self, layer)

    @property
    def batch(self) -> int:
        return self.storage.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, the kept sink included."""
        return sum(x.nbytes for x in (self.storage, self._sink_k, self._sink_v) if x is not None)

    @property
    def next_frame(self) -> int:
        """Absolute index of the first frame of the chunk under way (or of the next one)."""
        return self._next_frame

    @property
    def frames(self) -> int:
        """Frames of the chunk under way (or of the next one)."""
        return self.first_chunk_frames if self._next_frame == 0 else self.frames_per_chunk

    @property
    def overwrites(self) -> bool:
        """Whether later chunks may overwrite or move what this chunk sees."""
        return self.window_frames is not None

    @property
    def open(self) -> bool:
        """Whether a chunk is under way: `begin_chunk` was called and `commit` not yet."""
        return self._phases is not None

    @property
    def slot_start(self) -> int:
        """First token of the slot that the chunk under way is written to."""
        return self._slot_start

    @property
    def full(self) -> bool:
        """Whether the chunk under way sees as many frames as a window holds, as every later one will.

        Passes over such chunks differ by `slot_start` and the numbers in tensors, and by nothing else.
        """
        visible = self._visible_stop - self._visible_start
        return self.window_frames is not None and visible == self.capacity * self.tokens_per_frame

    def pin_positions(self) -> None:
        """From the next chunk on write every chunk's phases into the same two tensors, for CUDA graphs.

        Those of an earlier chunk are gone then: where gradients are on, `positions` makes copies. A first
        chunk of fewer frames has its own.
        """
        if self._pinned is None:
            tokens, device = self.frames_per_chunk * self.tokens_per_frame, self.storage.device
            with torch.inference_mode(False):
                cos, sin = (torch.zeros(tokens, self.rotary.head_dim // 2, device=device) for _ in range(2))
            self._pinned = cos, sin

    def reset(self) -> None:
        """Forget everything and start at frame 0, whatever was written before; the memory stays."""
        if self.storage.requires_grad:  # something with a graph was written
            self.storage.detach_()
        self.moments.begin_stream()
        self._next_frame = 0
        self._phases: tuple[Tensor, Tensor] | None = None
        self._slot_start = self._slot_tokens = 0
        self._renewal: tuple[Any, ...] | None = None
        self._visible_start = self._visible_stop = 0
        self._surplus = self._moves = 0
        self._views.clear()

    @property
    def keeps_last(self) -> bool:
        """Whether a chunk still lies in the buffer, its phases too, while the next one is written."""
        ring = self._layout.ring
        return self._pinned is None and (ring is None or ring >= 2 * self.frames_per_chunk)

    @integers_may_change
    def begin_chunk(self, *, renew_sink: bool = True) -> None:
        """Make room for the next chunk: choose its slot, evict what was there, move or average the sink.

        Does nothing where a chunk is under way already.

        Args:
            renew_sink: False: each layer's `LayerCache.renew_sink` is the caller's, once, before this chunk
                writes to the layer: until then the layer is as the chunk before saw it.

        Raises:
            ValueError: a stream without a window is at its `max_frames`, or a backward pass that computes
                something again would begin the chunk.
        """
        if self.open:
            return
        self.moments.refuse_write("begin_chunk")
        start, frames, tokens = self._next_frame, self.frames, self.tokens_per_frame
        if self.window_frames is None and start + frames > self.capacity:
            raise ValueError(
                f"ChunkCache: max_frames is {self.capacity}, but frames {start} to {start + frames - 1} "
                "come next; a stream without an end needs window_frames"
            )
        place = self._layout.place(start, frames)
        self._slot_start, self._slot_tokens = place.slot * tokens, frames * tokens
        self._visible_start, self._visible_stop = place.start * tokens, place.stop * tokens
        self._moves, self._surplus = self._surplus, place.surplus * tokens  # of the last chunk, of this one
        self._views.clear()
        self._renewal = self._plan_renewal(start) if place.evicts and self._sink_k is not None else None
        if renew_sink:
            self._renew_sink(slice(None))
        phases = self.rotary.phases(start, frames, self.rows, self.columns, self.storage.device)
        if self._pinned is not None and frames == self.frames_per_chunk:
            for pinned, value in zip(self._pinned, phases, strict=True):
                pinned.copy_(value)
            phases = self._pinned
        self._phases = phases
        self.moments.begin_chunk()

    @integers_may_change
    def commit(self) -> None:
        """Keep the chunk under way, with the keys and values that its last pass wrote.

        Raises:
            ValueError: no chunk is under way.
        """
        self._check_open("commit")
        self.moments.refuse_write("commit")
        self._invalidate(slice(None))  # compiled passes did not
        self.moments.end_chunk()
        self._next_frame += self.frames
        self._phases = None

    def _check_open(self, what: str) -> None:
        if self._phases is None:
            raise ValueError(f"ChunkCache: {what}: no chunk is under way, expected begin_chunk() before")

    def _invalidate(self, layers: slice) -> None:
        """The slot is about to be written: what earlier chunks were shown of it is gone."""
        self.tracked.invalidate(layers, self._slot_start, self._slot_start + self._slot_tokens)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Rotary phases (cos, sin) of the fresh chunk, float32 [T, D / 2] each.

        Raises:
            ValueError: as `begin_chunk`, or a backward pass computes an earlier chunk again.
        """
        if self._phases is None:
            self.begin_chunk()
            assert self._phases is not None
        self.moments.refuse_earlier("positions")
        cos, sin = self._phases
        if self._phases is self._pinned and torch.is_grad_enabled():
            return cos.clone(), sin.clone()
        return cos, sin

    def _plan_renewal(self, start: int) -> tuple[Any, ...]:
        """What `renew_sink_` is told about the chunk from frame `start` on, whatever the layer."""
        ring = self.capacity - self.sink_frames
        device = self.storage.device
        to_window: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.moves_sink:
            to_window = self.rotary.temporal_shift(start + self.frames - self.capacity, device)
        evicted = self.rotary.temporal_shift(-(start - ring), device)
        since_first = start - self.capacity  # frames since the first eviction
        if self._layout.spare:
            since_first = max(0, since_first)  # which may have been of a part of a chunk
        return self._slot_start, self.ema, since_first, *evicted, *to_window

    @torch.no_grad()
    def _renew_sink(self, layers: slice) -> None:
        """Move the last chunk's surplus to where it stays, average what is evicted into the sink, then write
        the sink's copy that this chunk sees.
        """
        if self._moves:
            start, end = self.sink_frames * self.tokens_per_frame, self.capacity * self.tokens_per_frame
            self.tracked.invalidate(layers, start, start + self._moves)
            seen = self.storage[layers]
            seen[:, :, :, start : start + self._moves].copy_(seen[:, :, :, end : end + self._moves])
        if self._renewal is None or self._sink_k is None:
            return
        self.tracked.invalidate(layers, self._surplus, self._surplus + self._sink_k.shape[2])
        count = range(len(self))[layers]
        renew: Any = torch.ops.stream_r1.renew_sinks_ if torch.compiler.is_compiling() else renew_sinks_
        where = (self.storage, self._sink_k, self._sink_v, count.start, len(count))
        renew(*where, *self._renewal, self._surplus)
