"""Values, names and whole messages as people read them: on one line, cut where they are long."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

_LONGEST = 2000  # characters of a message


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 256:  # Python refuses to write down the longest
            return f"a number of {x.bit_length()} bits"
        return repr(x)


_short = _Short()
_short.maxstring = _short.maxother = 80
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 8
_short.maxlevel = 3


def shown(value: Any) -> str:
    """The repr of a value; of a long one its beginning and its end."""
    return _short.repr(value)


def some(names: Iterable[object], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    texts = [str(name) for name in names]
    told = ", ".join(text if len(text) <= 200 else f"{text[:100]}...{text[-80:]}" for text in texts[:limit])
    return told + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


def one_line(text: str) -> str:
    """A message with whatever does not print (line ends, escape codes, ...) escaped, cut in its middle."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text.strip())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return line


def first_line(error: BaseException) -> str:
    """What a library's error says, without the lines that explain; its class if it says nothing."""
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__
