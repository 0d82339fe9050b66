"""What a stream gives: pieces of the video, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ChunkTimings:
    """Seconds that went into one chunk."""

    denoise: float
    cache: float  # cache-update passes since the last chunk: over it (if not fused), or over given frames
    decode: float
    elapsed: float  # spent in the stream up to this chunk's frames; of the first chunk: first-frame latency

    @property
    def total(self) -> float:
        return self.denoise + self.cache + self.decode


@dataclass(frozen=True)
class Chunk:
    """A piece of the video."""

    index: int  # of the chunk in the video, given frames counted
    latents: Tensor  # [B, f, C, h, w], normalised, float32
    frames: Tensor | None  # [B, t, 3, H, W] in [0, 1]; None without a VAE
    timings: ChunkTimings


@dataclass
class StreamTimings:
    """Seconds spent in a stream so far; what its consumer does between chunks does not count."""

    text: float = 0.0
    denoise: float = 0.0
    cache: float = 0.0
    decode: float = 0.0
    first_frame: float = 0.0  # from the call to the first chunk's frames, text and given frames included
    total: float = 0.0
    chunks: int = 0
    frames: int = 0  # pixel frames of one video (latent frames without a VAE)

    def add(self, chunk: dict[str, float], elapsed: float, frames: int) -> ChunkTimings:
        """Takes in a chunk's seconds by part, those spent on it in all, and its frames.

        Clean passes over given frames, before the first chunk, are told as that chunk's.
        """
        cache = chunk.get("cache", 0.0)
        told = cache if self.chunks else cache + self.cache
        self.denoise += chunk["denoise"]
        self.cache += cache
        self.decode += chunk["decode"]
        self.total += elapsed
        self.chunks += 1
        self.frames += frames
        if self.chunks == 1:
            self.first_frame = self.total
        return ChunkTimings(chunk["denoise"], told, chunk["decode"], self.total)

    @property
    def fps(self) -> float:
        """Frames a second of each video of the batch, end to end."""
        return self.frames / self.total if self.total else 0.0
