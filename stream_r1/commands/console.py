"""How commands talk: what they print is text, never markup, and a reader that is gone ends no work."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.status import Status
from rich.text import Text


class _Stream:
    """A stream whose reader may go, as with a closed pipe or a lost terminal.

    lasting: what can't be written any more is dropped; else the process ends as others do, by the code of
    SIGPIPE, or OSError says why.
    """

    def __init__(self, stream: TextIO, lasting: bool) -> None:
        self._stream = stream
        self._lasting = lasting
        self._gone = False

    def write(self, text: str) -> int:
        if not self._gone:
            try:
                return self._stream.write(text)
            except (OSError, ValueError) as error:
                self._lost(error)
        return len(text)

    def flush(self) -> None:
        if not self._gone:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lost(error)

    def _lost(self, error: OSError | ValueError) -> None:
        self._gone = True
        try:  # what its buffer holds would fail again when Python ends
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
        except (OSError, ValueError):
            pass
        if self._lasting:
            return
        number = error.errno if isinstance(error, OSError) else errno.EBADF
        if number == errno.EPIPE:
            raise SystemExit(128 + signal.SIGPIPE)
        raise OSError(number, os.strerror(number or 0), "standard output") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Console(Console):
    def status(self, status: RenderableType, **options: Any) -> Status:
        """A spinner takes its words for markup: here they are text."""
        return super().status(Text(status) if isinstance(status, str) else status, **options)


def make_console(*, lasting: bool = False, quiet: bool = False, stderr: bool = False) -> Console:
    """A console for text as it is: brackets and colons of paths and prompts are nothing else.

    Args:
        lasting: for commands whose work is in files: they do it to its end, whoever looks on.
    """
    stream = sys.stderr if stderr else sys.stdout
    file: Any = None if stream is None else _Stream(stream, lasting)
    return _Console(file=file, quiet=quiet or stream is None, markup=False, emoji=False)
