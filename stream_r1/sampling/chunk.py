"""What a stream gives: pieces of the video, and where the time went."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from stream_r1.clock import Clock, Moment
from stream_r1.sampling.decoding import Decoded


@dataclass(frozen=True)
class ChunkTimings:
    """Seconds that went into one chunk."""

    denoise: float
    cache: float  # cache-update passes since the last chunk: over it (if not fused), or over given frames
    decode: float
    elapsed: float  # spent in the stream up to this chunk's frames; of the first chunk: first-frame latency

    @property
    def total(self) -> float:
        """More than the chunk adds to `elapsed` where it was decoded while the next one was made."""
        return self.denoise + self.cache + self.decode


@dataclass
class StreamTimings:
    """Seconds spent in a stream so far; what its consumer does between chunks does not count."""

    text: float = 0.0
    denoise: float = 0.0
    cache: float = 0.0
    decode: float = 0.0
    first_frame: float = 0.0  # from the call to the first chunk's frames, text and given frames included
    total: float = 0.0  # during which a chunk was in the making
    chunks: int = 0
    frames: int = 0  # pixel frames of one video (latent frames without a VAE)

    def add(self, denoise: float, cache: float, decode: float, elapsed: float, frames: int) -> ChunkTimings:
        """Takes in a chunk's seconds by part, those that it adds to the total, and its frames.

        Clean passes over given frames, before the first chunk, are told as that chunk's.
        """
        told = cache if self.chunks else cache + self.cache
        self.denoise += denoise
        self.cache += cache
        self.decode += decode
        self.total += elapsed
        self.chunks += 1
        self.frames += frames
        if self.chunks == 1:
            self.first_frame = self.total
        return ChunkTimings(denoise, told, decode, self.total)

    @property
    def fps(self) -> float:
        """Frames a second of each video of the batch, end to end."""
        return self.frames / self.total if self.total else 0.0


class ChunkWork:
    """Moments in the work on a chunk, of which a GPU may have some before it.

    Args:
        begun: when it was asked for.
        clock: of the parts "denoise" and "cache".
        made: when its latents are there.
        decoding: from when to when; None: latents only.
        frames: that it adds to the video.
    """

    def __init__(
        self,
        begun: Moment,
        clock: Clock,
        made: Moment,
        decoding: tuple[Moment, Moment] | None,
        frames: int,
    ) -> None:
        self.begun, self.made, self.frames = begun, made, frames
        self.done = made if decoding is None else decoding[1]
        self.timings: ChunkTimings | None = None  # once they were read
        self._clock, self._decoding = clock, decoding

    def read(self, sums: StreamTimings, before: Moment) -> None:
        """Waits for the work and adds its times to a stream's; `before`: when the chunk before was done."""
        seconds = self._clock.seconds
        decode = 0.0 if self._decoding is None else self.done.since(self._decoding[0])
        elapsed = min(self.done.since(self.begun), self.done.since(before))  # work may overlap
        self.timings = sums.add(seconds["denoise"], seconds.get("cache", 0.0), decode, elapsed, self.frames)


class StreamTimer:
    """The timings of a stream, read as its chunks are done.

    Args:
        sums: up to its first chunk.
        begun: when that may begin.
    """

    def __init__(self, sums: StreamTimings, begun: Moment) -> None:
        self._sums, self._before = sums, begun
        self._open: deque[ChunkWork] = deque()

    def add(self, work: ChunkWork) -> None:
        self.sums()  # so that work that is done is not kept
        self._open.append(work)

    def of(self, work: ChunkWork) -> ChunkTimings:
        """Waits for the chunk."""
        while work.timings is None:
            self._read()
        return work.timings

    def sums(self, *, wait: bool = False) -> StreamTimings:
        """Of the chunks that are done; or of all."""
        while self._open and (wait or self._open[0].done.query()):
            self._read()
        return self._sums

    def _read(self) -> None:
        work = self._open.popleft()
        work.read(self._sums, self._before)
        self._before = work.done


class Chunk:
    """A piece of the video. On a GPU it may be in the making; what is read of it waits for it.

    Attributes:
        index: of the chunk in the video, given frames counted.
        latents: [B, f, C, h, w], normalised, float32; there for the device's current stream.
    """

    def __init__(
        self, index: int, latents: Tensor, decoded: Decoded | None, work: ChunkWork, timer: StreamTimer
    ) -> None:
        self.index, self.latents = index, latents
        self._decoded, self._work, self._timer = decoded, work, timer

    @property
    def frames(self) -> Tensor | None:
        """[B, t, 3, H, W] in [0, 1]; None without a VAE. On a GPU its current stream waits for them."""
        return None if self._decoded is None else self._decoded.frames()

    def to_uint8(self) -> Tensor:
        """The frames as [B, t, 3, H, W] uint8 on the CPU: Python waits for them, and for no later chunk.

        Raises:
            ValueError: no VAE, or frames that are not numbers in [0, 1].
        """
        if self._decoded is None:
            raise ValueError("Chunk.to_uint8: expected a stream with a VAE, got latents only")
        return self._decoded.to_uint8()

    @property
    def made(self) -> Moment:
        """When the latents are there."""
        return self._work.made

    @property
    def timings(self) -> ChunkTimings:
        """Waits for the chunk."""
        return self._timer.of(self._work)
