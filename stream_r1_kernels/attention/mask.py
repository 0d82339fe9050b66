"""Which keys a query sees, as ranges: the base of all masks, and the one of chunk-wise causal models."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise

import torch
from torch import Tensor

from ..arguments import check_integer

# Queries [begin, end), and the ranges [first, last) of keys that all of them see.
Block = tuple[int, int, Sequence[tuple[int, int]]]


class RangeMask(ABC):
    """Which keys a query sees, given as ranges. A mask is a subclass with one method, `blocks`.

    Every backend computes what the ranges hold and reads nothing else, forward and backward. Write the
    subclass as a frozen dataclass: masks are compared by value, and what one gives for a length is kept.
    `torch.compile` traces `blocks`: arithmetic, loops and lists are what it follows, also where numbers vary.
    """

    @abstractmethod
    def blocks(self, tokens: int) -> Sequence[Block]:
        """(begin, end, [(first, last), ...]) of every block of queries in a sequence of `tokens`.

        Queries [begin, end) see the keys [first, last) of each range. Blocks are in order and leave no query
        out; the ranges of one are in order and don't overlap. A block without a range sees nothing: its
        result is zeros, without gradients. Blocks and ranges of 64 tokens and more are fast.
        """

    def table(self, tokens: int) -> tuple[int, ...]:
        """The blocks as the ops take them: n, then for each block its begin, its end and n ranges.

        n is the most ranges that a block has; others are filled up with (0, 0).

        Raises:
            ValueError: blocks that are not as `blocks` says.
            TypeError: a mask that is no frozen dataclass.
        """
        tokens = len(range(tokens))  # which makes a length that varies a constant of a compiled graph
        if torch.compiler.is_compiling():
            return _encode(self, tokens)
        if not getattr(getattr(type(self), "__dataclass_params__", None), "frozen", False):
            raise TypeError(f"{type(self).__name__}: expected a mask that is a frozen dataclass")
        return _kept_table(self, tokens)

    def visible(self, tokens: int) -> Tensor:
        """The mask as a picture: True where a query (row) sees a key (column), `[T, T]`."""
        seen = torch.zeros(tokens, tokens, dtype=torch.bool)
        for begin, end, ranges in blocks_of(self.table(tokens)):
            for first, last in ranges:
                seen[begin:end, first:last] = True
        return seen

    def visible_pairs(self, tokens: int) -> int:
        """(query, key) pairs that see each other in a sequence of `tokens`."""
        return count_pairs(self.table(tokens))


def _encode(mask: RangeMask, tokens: int) -> tuple[int, ...]:
    name, blocks = f"{type(mask).__name__}.blocks", mask.blocks(tokens)
    most = max([0, *[len(ranges) for _, _, ranges in blocks]])
    table, place = [most], 0
    for begin, end, ranges in blocks:
        row = [begin, end, *chain.from_iterable(ranges)]
        for number in row:
            check_integer(name, "blocks and ranges", number)
        if not place == begin < end:
            raise ValueError(f"{name}: expected a block that begins at query {place}, got [{begin}, {end})")
        place, before = end, 0
        for first, last in ranges:
            if not before <= first < last <= tokens:
                raise ValueError(
                    f"{name}: expected ranges in order, each with a key, within [{before}, {tokens}), got "
                    f"[{first}, {last}) for queries [{begin}, {end})"
                )
            before = last
        table += [operator.index(number) for number in row] + [0, 0] * (most - len(ranges))
    if place != tokens:
        raise ValueError(f"{name}: expected blocks up to query {tokens}, got them up to {place}")
    return tuple(table)


_kept_table = lru_cache(maxsize=64)(_encode)


def blocks_of(table: Sequence[int]) -> list[Block]:
    """What a table holds, without the ranges that fill it up."""
    step = 2 + 2 * table[0]
    blocks: list[Block] = []
    for at in range(1, len(table), step):
        begin, end, *row = table[at : at + step]
        ranges = [(first, last) for first, last in zip(row[::2], row[1::2], strict=True) if first < last]
        blocks.append((begin, end, ranges))
    return blocks


def count_pairs(table: Sequence[int]) -> int:
    """(query, key) pairs that see each other."""
    return sum(
        (end - begin) * sum(last - first for first, last in ranges) for begin, end, ranges in blocks_of(table)
    )


def transposed(blocks: Sequence[Block]) -> list[Block]:
    """The same from the keys: pieces of keys, in order, and the ranges of queries that see all of a piece.

    Other queries see none of it. Keys that nobody sees are in pieces without a range.
    """
    tokens = blocks[-1][1] if blocks else 0
    starts: dict[int, list[int]] = {0: []}  # first key -> blocks that see from there on
    stops: dict[int, list[int]] = {tokens: []}
    for index, (_, _, ranges) in enumerate(blocks):
        for first, last in ranges:
            starts.setdefault(first, []).append(index)
            stops.setdefault(last, []).append(index)
    pieces: list[Block] = []
    seeing: set[int] = set()
    cuts = sorted({*starts, *stops})
    for first, last in pairwise(cuts):
        seeing.difference_update(stops.get(first, ()))
        seeing.update(starts.get(first, ()))
        queries: list[tuple[int, int]] = []
        for begin, end, _ in (blocks[index] for index in sorted(seeing)):
            before = queries.pop() if queries and queries[-1][1] == begin else (begin, begin)
            queries.append((before[0], end))
        pieces.append((first, last, queries))
    return pieces


@dataclass(frozen=True)
class ChunkMask(RangeMask):
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

    def blocks(self, tokens: int) -> list[Block]:
        """One block a chunk: the clean ones, then, with teacher forcing, the noisy ones."""
        frames, each = self.frames(tokens), self.tokens_per_frame
        clean, noisy = [], []
        for start, end in self.chunks(frames):
            before = 0 if self.window_frames is None else max(0, end - self.window_frames)
            seen = [(0, min(self.sink_frames, before)), (before, end)]
            clean.append((start, end, seen))
            own = (frames + start, frames + end)
            noisy.append((*own, [*((first, min(last, start)) for first, last in seen), own]))
        return [
            (
                start * each,
                end * each,
                [(first * each, last * each) for first, last in seen if first < last],
            )
            for start, end, seen in (clean + noisy if self.teacher_forcing else clean)
        ]
