"""One who watches: a few frames wait for a connection at most, and the newest go first."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from stream_r1.serve.protocol import Frame, as_text

Send = Callable[[str | bytes], Awaitable[None]]
_MOST_WAITING = 256  # messages to a viewer that takes none


class Viewer:
    """What waits for a viewer, and what is on its way there.

    Args:
        send: sends a text or binary message; may wait as long as the connection does.
        window: frames that may be on their way, and as many that may wait. Where a connection is slower,
            all but the newest frame are dropped.
    """

    def __init__(self, send: Send, window: int) -> None:
        self.sent = self.dropped = 0
        self._send = send
        self._window = window
        self._frames: deque[tuple[Frame, bytes]] = deque()
        self._told: deque[str] = deque(maxlen=_MOST_WAITING)
        self._under_way: deque[int] = deque()
        self._wake = asyncio.Event()

    def offer(self, frame: Frame, packed: bytes) -> None:
        """Never waits. A frame of another prompt is worth more than all before it."""
        waiting = self._frames
        if waiting and (len(waiting) >= self._window or waiting[-1][0].prompt != frame.prompt):
            self.dropped += len(waiting)
            waiting.clear()
        waiting.append((frame, packed))
        self._wake.set()

    def tell(self, message: dict[str, Any]) -> None:
        """Never waits; messages go before frames."""
        self._told.append(as_text(message))
        self._wake.set()

    def seen(self, number: int) -> None:
        """Frames up to this one have arrived."""
        while self._under_way and self._under_way[0] <= number:
            self._under_way.popleft()
        self._wake.set()

    async def run(self) -> None:
        """Send what comes, until the connection fails."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._told or (self._frames and len(self._under_way) < self._window):
                if self._told:
                    await self._send(self._told.popleft())
                    continue
                frame, packed = self._frames.popleft()
                self._under_way.append(frame.number)
                await self._send(packed)
                self.sent += 1


class Allowance:
    """So many messages a second, and a few more at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._at = burst, time.monotonic()

    def take(self) -> bool:
        """Whether one more is allowed now."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        allowed = self._left >= 1
        self._left -= allowed
        return allowed
