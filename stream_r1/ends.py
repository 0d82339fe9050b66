"""How a command ends: a signal at any moment, imports included, and every error are one line and a code.

Imports nothing that takes time, so that it is there first.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Received:
    number = 0  # the first signal that asked to stop; 0: none


def received() -> int:
    """The signal that ends this command; 0: none."""
    return _Received.number


@contextmanager
def reporting_errors(describe: Callable[[Exception], str] | None = None) -> Iterator[None]:
    """Ends the process with one line on stderr for what ends the context: 2 for an error, 128 + a signal.

    SIGTERM and a lost terminal (SIGHUP) interrupt as Ctrl-C does; what is ignored stays ignored, as under
    nohup. Inside of one another the outer one only waits.

    Args:
        describe: an error as a line; None: errors are the caller's.
    """
    _Received.number = 0
    before = {}
    with suppress(ValueError):  # not the main thread
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, _interrupt)
    try:
        yield
    except SystemExit:
        if not _Received.number:
            raise
    except KeyboardInterrupt:
        _Received.number = _Received.number or signal.SIGINT
    except Exception as error:  # imports turn an interrupt into errors of their own
        if not _Received.number:
            if describe is None:
                raise
            fail(describe(error), 2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if _Received.number:
        fail(f"stopped by {signal.Signals(_Received.number).name}", 128 + _Received.number)


def fail(message: str, code: int) -> None:
    """Says why and exits, whatever became of stderr; of several processes that a signal ends, one talks."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or code == 2:
        with suppress(OSError, ValueError, AttributeError):
            print(f"stream-r1: {message}", file=sys.stderr, flush=True)
    _Received.number = 0  # it is reported
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _Received.number = _Received.number or number
    raise KeyboardInterrupt
