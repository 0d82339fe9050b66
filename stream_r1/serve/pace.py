"""How early a chunk is begun and how long a frame is shown: of what the last chunks took."""

from __future__ import annotations

import statistics
from collections import deque

_CHUNKS = 8  # that count
_MARGIN = 1.3  # times the longest of them
_SLACK = 0.1  # seconds more: for what a busy machine does meanwhile, and for a change's own work


class Pace:
    """Of one stream.

    Args:
        fps: frames a second.
        frames_per_chunk: in the middle of a stream.
    """

    def __init__(self, fps: float, frames_per_chunk: int) -> None:
        self._fps, self._frames = fps, frames_per_chunk
        self._spent: deque[float] = deque(maxlen=_CHUNKS)
        self._longest: deque[float] = deque(maxlen=_CHUNKS)

    def add(self, spent: float, longest: float | None) -> None:
        """A chunk was made.

        Args:
            spent: seconds from its beginning to its pictures.
            longest: of them, those of its longest stage, for stages overlap; None: a change was part of it,
                which says nothing about the chunks to come.
        """
        self._spent.append(spent)
        if longest is not None:
            self._longest.append(longest)

    @property
    def lead(self) -> float:
        """Seconds from the beginning of a chunk to the time when its first frame is due."""
        return _MARGIN * max(self._spent, default=float("inf")) + _SLACK

    @property
    def period(self) -> float:
        """Seconds that a frame is shown: longer than it should be where the machine makes them slower."""
        each = statistics.mean(self._longest) / self._frames if self._longest else 0.0
        return max(1 / self._fps, each)

    @property
    def typical(self) -> float:
        """Seconds that a chunk takes, the median; 0: none was made."""
        return statistics.median(self._spent) if self._spent else 0.0
