"""Which frames a query sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_integer


@dataclass(frozen=True)
class ChunkMask:
    """Visibility between whole frames, block-causal by chunks.

    A query in chunk c sees every frame up to the end of its chunk. With `window_frames` = W it sees the last
    W frames up to there, its own chunk included, and with `sink_frames` = S also the first S frames (on top
    of the window). Chunk 0 has `first_chunk_frames` frames (default: as the others), the last chunk may be
    cut short.

    Six frames, frames_per_chunk = 2:                window_frames = 2, sink_frames = 1:

        1 1 0 0 0 0                                      1 1 0 0 0 0
        1 1 0 0 0 0                                      1 1 0 0 0 0
        1 1 1 1 0 0                                      1 0 1 1 0 0
        1 1 1 1 0 0                                      1 0 1 1 0 0
        1 1 1 1 1 1                                      1 0 0 0 1 1
        1 1 1 1 1 1                                      1 0 0 0 1 1

    teacher_forcing: the sequence is [clean | noisy], each half with the same frames. Clean is as above; a
    noisy query of chunk c sees the clean frames that a clean query of its chunk sees before chunk c, and its
    own noisy chunk:

        clean chunk 0 | 1 0   0 0
              chunk 1 | 1 1   0 0
        noisy chunk 0 | 0 0   1 0
              chunk 1 | 1 0   0 1

    Raises ValueError for sizes out of range (TypeError for what is no integer); a window smaller than a chunk
    is refused, as a chunk always sees all of itself.
    """

    tokens_per_frame: int
    frames_per_chunk: int
    window_frames: int | None = None
    sink_frames: int = 0
    first_chunk_frames: int | None = None
    teacher_forcing: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens_per_frame", "frames_per_chunk", "window_frames", "first_chunk_frames"):
            value = getattr(self, name)
            if value is None and name in ("window_frames", "first_chunk_frames"):
                continue
            check_integer("ChunkMask", name, value)
            if value < 1:
                raise ValueError(f"ChunkMask: {name}: expected at least 1, got {value}")
        check_integer("ChunkMask", "sink_frames", self.sink_frames)
        if self.sink_frames < 0:
            raise ValueError(f"ChunkMask: sink_frames: expected at least 0, got {self.sink_frames}")
        longest = max(self.frames_per_chunk, self.first_chunk_frames or 0)
        if self.window_frames is not None and self.window_frames < longest:
            raise ValueError(
                f"ChunkMask: window_frames: expected at least a chunk ({longest} frames), "
                f"got {self.window_frames}"
            )

    def frames(self, tokens: int) -> int:
        """Frames in a sequence of `tokens` (of one half, when teacher forcing), or ValueError."""
        unit = self.tokens_per_frame * (2 if self.teacher_forcing else 1)
        if tokens % unit:
            halves = "2 halves of whole frames" if self.teacher_forcing else "whole frames"
            raise ValueError(f"ChunkMask: expected {halves}, a multiple of {unit} tokens, got {tokens}")
        return tokens // unit

    def chunks(self, num_frames: int) -> list[tuple[int, int]]:
        """(first frame, end frame) of every chunk."""
        first = self.first_chunk_frames or self.frames_per_chunk
        ends = [
            min(first, num_frames),
            *range(first + self.frames_per_chunk, num_frames, self.frames_per_chunk),
        ]
        if ends[-1] < num_frames:
            ends.append(num_frames)
        return [(start, end) for start, end in zip([0, *ends], ends, strict=False) if end > start]

    def visible(self, num_frames: int) -> Tensor:
        """True where a query frame (row) sees a key frame (column): `[F, F]`; teacher forcing `[2F, 2F]`."""
        seen = torch.zeros(num_frames, num_frames, dtype=torch.bool)
        own = torch.zeros_like(seen)
        for start, end in self.chunks(num_frames):
            window_start = 0 if self.window_frames is None else max(0, end - self.window_frames)
            seen[start:end, window_start:end] = True
            seen[start:end, : min(self.sink_frames, end)] = True
            own[start:end, start:end] = True
        if not self.teacher_forcing:
            return seen
        clean_only = torch.zeros_like(seen)
        return torch.cat([torch.cat([seen, clean_only], 1), torch.cat([seen & ~own, own], 1)])

    def visible_pairs(self, tokens: int) -> int:
        """(query, key) pairs of tokens that see each other in a sequence of `tokens`."""
        frames = sum(
            (end - start) * sum(last - first for first, last in ranges)
            for start, end, ranges in self.blocks(self.frames(tokens))
        )
        return frames * self.tokens_per_frame**2

    def blocks(self, num_frames: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """The same as blocks of queries: (first frame, end frame, ranges of frames that they see) of each.

        With teacher forcing the noisy half's frames count on from `num_frames`.
        """
        clean, noisy = [], []
        for start, end in self.chunks(num_frames):
            before = 0 if self.window_frames is None else max(0, end - self.window_frames)
            sink = min(self.sink_frames, before)
            seen = [(0, end)] if sink == before else [(0, sink), (before, end)]
            clean.append((start, end, [r for r in seen if r[0] < r[1]]))
            past = [(first, min(last, start)) for first, last in seen]
            own = (num_frames + start, num_frames + end)
            noisy.append((*own, [*(r for r in past if r[0] < r[1]), own]))
        return clean + noisy if self.teacher_forcing else clean
