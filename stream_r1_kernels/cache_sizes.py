"""Which sizes of a streaming cache fit together, and the room that they need."""

from .arguments import check_integer

POSITIONS = ("absolute", "window")


def capacity_of(
    chunk: int,
    first: int,
    window: int | None,
    sink: int,
    positions: str,
    ema: float | None,
    max_frames: int | None,
) -> int:
    """Frames that a `ChunkCache` has room for; ValueError for sizes that do not fit together, TypeError for
    what is no integer.
    """
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
        return max_frames
    if ema is not None and sink != chunk:
        raise ValueError(
            "ChunkCache: with ema the evicted chunk becomes part of the sink, "
            f"so sink_frames must equal frames_per_chunk = {chunk}, got {sink}"
        )
    if sink and (sink < first or (sink - first) % chunk):
        raise ValueError(
            f"ChunkCache: sink_frames must end with a chunk: {first} + a multiple of {chunk} "
            f"(first_chunk_frames, frames_per_chunk), got {sink}"
        )
    if window - sink < chunk or (window - sink) % chunk:
        raise ValueError(
            f"ChunkCache: window_frames - sink_frames must be a positive multiple of {chunk} "
            f"(frames_per_chunk), got {window} - {sink}"
        )
    return window
