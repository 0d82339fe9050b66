"""What tells the content of files and folders from another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

_WHOLE = 1 << 26  # bytes of the largest file that is read from beginning to end
_PIECES, _PIECE = 16, 1 << 16  # of a larger one, evenly spread, the first and the last included


def fingerprint(places: Iterable[Path], *settings: object) -> str:
    """Of the files in so many files and folders, and of settings; in a second however large they are.

    Names in the folders count, and content: of files up to 64 MiB all of it, of larger ones their size and 1
    MiB spread over them. Where the folders lie and when they were written does not, nor do hidden files and
    ``.md``. A place that is not there counts as empty.
    """
    digest = hashlib.sha256(repr([str(setting) for setting in settings]).encode())
    for place in places:
        paths = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in (path for path in paths if path.is_file()):
            name = file.relative_to(place)
            if any(part.startswith(".") for part in name.parts) or name.suffix == ".md":
                continue
            size = file.stat().st_size
            digest.update(f"{name}\0{size}\0".encode())
            with file.open("rb") as content:
                if size <= _WHOLE:
                    digest.update(content.read())
                    continue
                for piece in range(_PIECES):
                    content.seek((size - _PIECE) * piece // (_PIECES - 1), os.SEEK_SET)
                    digest.update(content.read(_PIECE))
    return digest.hexdigest()[:24]
