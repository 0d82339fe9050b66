"""The latents behind a window's keys and values, kept so that another prompt can compute these again."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from stream_r1_kernels import ChunkCache


class HeldChunks:
    """Latents of the chunks that a stream's window holds: those of the sink, and the last ones.

    `chunks()` passed through the student into an empty cache give the window's keys and values under the
    prompt of these passes. Attention knows the distances of frames alone, so it does not matter that they
    then count from frame 0. Source: KV recache of LongLive (2509.22622), which leaves the sink as it was;
    here its frames are recomputed too, and a moving average starts again from them.

    Args:
        cache: the stream's.
    """

    def __init__(self, cache: ChunkCache) -> None:
        first, later = cache.first_chunk_frames, cache.frames_per_chunk
        sink, window = cache.sink_frames if cache.window_frames is not None else 0, cache.window_frames
        self._refusal: str | None = None
        if sink and not cache.moves_sink:
            self._refusal = "positions 'window' or no sink, got 'absolute' and a sink of " + str(sink)
        elif sink and (sink < first or (sink - first) % later):
            self._refusal = f"a sink of whole chunks, {first}, {first + later}, ... frames, got {sink}"
        self._first = first
        self._sink_chunks = 1 + (sink - first) // later if sink else 0
        self._sink: list[tuple[int, Tensor]] = []
        last = None
        if window is not None:
            last = (window - sink) // later if sink else 1 + (window - first) // later
        self._last: deque[tuple[int, Tensor]] = deque(maxlen=last)

    def add(self, index: int, latents: Tensor) -> None:
        """The x0 [B, f, C, h, w] of chunk `index` of the stream."""
        if self._refusal is None:
            kept = self._sink if len(self._sink) < self._sink_chunks else self._last
            kept.append((index, latents))

    def chunks(self) -> list[tuple[int, Tensor]]:
        """(index, x0) of the held chunks in their order; the first one is as long as a cache's first is.

        Raises:
            ValueError: a sink at absolute positions, whose distance to the window grows with the stream, or
                one that ends amid a chunk.
        """
        if self._refusal is not None:
            raise ValueError(f"switch: recache needs {self._refusal}")
        held = [*self._sink, *self._last]
        if held:
            index, latents = held[0]
            held[0] = index, latents[:, -self._first :]
        return held
