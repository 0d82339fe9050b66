"""Files of text and JSON that others wrote: read whole, within bounds, or refused with their name."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from stream_r1.messages import shown

_MOST_BYTES = 2**26

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class FileError(ValueError):
    """A file that cannot be used; the message names it, what was expected and what was found."""


def require_file(path: str | Path, what: str = "a file") -> int:
    """The size in bytes of what can be read to its end; a pipe, for one, may have none.

    Raises:
        OSError: nothing that can be looked at is there.
        FileError: it is a folder, a pipe, a device.
    """
    try:
        found = os.stat(path)
    except ValueError:  # a zero byte
        raise FileError(f"{shown(str(path))}: expected {what}, got no name of a file") from None
    for is_kind, kind in _KINDS:
        if is_kind(found.st_mode):
            raise FileError(f"{path}: expected {what}, got {kind}")
    return found.st_size


def read_text(path: str | Path, what: str = "a text file", most: int = _MOST_BYTES) -> str:
    """A file in UTF-8.

    Raises:
        OSError, FileError: see `require_file`; it has more than `most` bytes, or is in no UTF-8.
    """
    require_file(path, what)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise FileError(f"{path}: expected {what} of at most {most} bytes, got more")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: expected {what} in UTF-8; {error}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object. Raises OSError or FileError, see `read_text` and `parse_json`."""
    content = parse_json(read_text(path, "JSON"), str(path))
    if not isinstance(content, dict):
        raise FileError(f"{path}: expected a JSON object, got {shown(content)}")
    return content


def parse_json(text: str, source: str) -> Any:
    """JSON, of finite numbers and with each key once. Raises FileError for anything else."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source}: expected JSON; {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{shown(text)} is too large a number")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {shown(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return found
