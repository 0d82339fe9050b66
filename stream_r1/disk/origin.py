"""What a folder's results were made of: kept beside them, and compared before more are added or shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stream_r1.config import SettingsError
from stream_r1.disk.whole import write_text
from stream_r1.files import read_json
from stream_r1.messages import shown

FILE = "origin.json"


def keep_origin(folder: Path, origin: Mapping[str, Any]) -> None:
    """Write what the folder's results are made of: names, numbers and fingerprints, as JSON has them."""
    write_text(folder / FILE, json.dumps(origin, indent=1) + "\n")


def require_origin(folder: Path, origin: Mapping[str, Any], results: Path) -> None:
    """Let nothing be taken for what it is not.

    Args:
        results: a file that only a folder with an origin should have.

    Raises:
        SettingsError: the folder's results are of something else, which is named.
    """
    instead = "remove the folder, or name another one by out="
    if not (folder / FILE).exists():
        if results.exists():
            raise SettingsError(f"{folder}: expected {FILE} beside {results.name}, got none: {instead}")
        return
    for key, was, now in changes(read_json(folder / FILE), origin):
        raise SettingsError(f"{folder}: begun with {key} {shown(was)}, now it is {shown(now)}: {instead}")


def changes(kept: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two differ: the dotted key, what was kept, what is now; None where one has no such key."""
    for key in sorted(kept.keys() | now.keys()):
        a, b = kept.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from changes(a, b, f"{at}{key}.")
        elif a != b:
            yield f"{at}{key}", a, b
