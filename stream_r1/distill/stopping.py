"""Stopping a training at a safe moment."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Turns SIGINT (Ctrl-C), SIGTERM and SIGHUP (a lost terminal) into a request that a loop can honour at a
    safe moment.

        with StopRequest() as stop:
            while not stop.signal: ...

    A second SIGINT interrupts at once; more SIGTERMs change nothing: launchers and schedulers both send them.
    Outside of the main thread signals are left alone, and only `request()` asks.
    """

    def __init__(self) -> None:
        self.signal = 0
        """The signal that asked to stop; 0: none."""
        self._previous: dict[int, Any] = {}

    def request(self) -> None:
        """Asks as Ctrl-C does."""
        self.signal = self.signal or signal.SIGINT

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def __enter__(self) -> StopRequest:
        self.signal = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
