"""Which sizes of a streaming cache fit together, and where its chunks lie in the buffer."""

from __future__ import annotations

import math
from typing import NamedTuple

from .arguments import check_integer

POSITIONS = ("absolute", "window")


class Place(NamedTuple):
    """Where a chunk lies and what it sees, in frames of the buffer."""

    slot: int  # first frame of its slot
    start: int  # of what it sees, its slot included: one range
    stop: int
    evicts: bool  # frames have left the window for it
    surplus: int  # frames of its slot past the ring's end


class Layout(NamedTuple):
    """The buffer `[sink | ring | spare]` of a cache, in frames.

    A frame f after the sink lies at `sink + (f - sink) % ring` while it is visible, so a full window is sink
    and ring, in whatever order. Where the ring is no whole number of chunks, some chunks do not fit before
    its end. Their surplus lies in the spare frames until the next chunk begins; then it moves to the ring's
    start. What such a chunk sees lies as much further, the sink put again before it.

        ring of 4, chunks of 3:    0 1 2 .|. .    . . 2 3|4 5    . 5 6 7|8 .    8 9 A B|. .
    """

    capacity: int  # frames that a chunk sees at most
    sink: int
    ring: int | None  # None: no window
    lead: int  # free frames before a short first chunk, which make the chunks after it end with the ring
    spare: int

    def place(self, start: int, frames: int) -> Place:
        """Of the chunk of frames [start, start + frames)."""
        if self.ring is None:
            return Place(start, 0, start + frames, False, 0)
        evicts = start + frames > self.capacity
        slot = self.sink + (start + self.lead - self.sink) % self.ring if evicts else start + self.lead
        if not evicts:
            return Place(slot, self.lead, slot + frames, False, 0)
        surplus = max(0, slot + frames - self.capacity) if self.spare else 0
        return Place(slot, surplus, surplus + self.capacity, True, surplus)


def layout_of(
    chunk: int,
    first: int,
    window: int | None,
    sink: int,
    positions: str,
    ema: float | None,
    max_frames: int | None,
) -> Layout:
    """Of a `ChunkCache`; ValueError for sizes that do not fit together, TypeError for what is no integer."""
    sizes = {"frames_per_chunk": chunk, "first_chunk_frames": first, "sink_frames": sink}
    limits = {"window_frames": window, "max_frames": max_frames}
    for name, size in (sizes | {name: size for name, size in limits.items() if size is not None}).items():
        check_integer("ChunkCache", name, size)
    if chunk < 1:
        raise ValueError(f"ChunkCache: frames_per_chunk must be at least 1, got {chunk}")
    if not 1 <= first <= chunk:
        raise ValueError(
            f"ChunkCache: first_chunk_frames must be in 1 .. {chunk} (frames_per_chunk), got {first}"
        )
    if sink < 0:
        raise ValueError(f"ChunkCache: sink_frames must not be negative, got {sink}")
    if positions not in POSITIONS:
        raise ValueError(f"ChunkCache: positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    if ema is not None and not 0 <= ema <= 1:
        raise ValueError(f"ChunkCache: ema must be between 0 and 1, got {ema}")
    if window is None:
        if max_frames is None or max_frames < 1:
            raise ValueError(
                f"ChunkCache: max_frames must be at least 1 without window_frames, got {max_frames}"
            )
        if ema is not None:
            raise ValueError(
                f"ChunkCache: ema must be None without window_frames (nothing is evicted), got {ema}"
            )
        return Layout(max_frames, 0, None, 0, 0)
    if window < sink + chunk:
        raise ValueError(
            f"ChunkCache: window_frames must have room for the sink and a chunk, at least {sink} + {chunk} "
            f"(sink_frames, frames_per_chunk), got {window}"
        )
    ring = window - sink
    if ema is not None and (sink != chunk or first != chunk or ring % chunk):
        raise ValueError(
            "ChunkCache: with ema every evicted chunk becomes part of the sink, so sink_frames and "
            f"first_chunk_frames must equal frames_per_chunk = {chunk}, window_frames be a multiple of it; "
            f"got {sink}, {first} and {window}"
        )
    if sink == 0 and ring % chunk == 0:
        return Layout(window, 0, ring, chunk - first, 0)
    # Chunks begin at these frames of the ring: `first - sink`, and from there on by whole chunks around it.
    step = math.gcd(ring, chunk)
    return Layout(window, sink, ring, 0, chunk - step + (first - sink) % step)
