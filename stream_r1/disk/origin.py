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
    """Write what the folder's results are made of: names, numbers and fingerprints, in parts or flat."""
    write_text(folder / FILE, json.dumps(dict(_flat(origin)), indent=1) + "\n")


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
    kept, now = read_json(folder / FILE), dict(_flat(origin))
    changed = [key for key in {**kept, **now} if kept.get(key) != now.get(key)]
    if changed:
        was, wanted = shown(kept.get(changed[0])), shown(now.get(changed[0]))
        raise SettingsError(f"{folder}: begun with {changed[0]} {was}, now it is {wanted}: {instead}")


def _flat(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", list(value) if isinstance(value, tuple) else value
