"""Where a command writes, checked before any work: it can be written to, and is nothing that is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path


def check_files(option: str, files: Iterable[Path], inputs: Mapping[str, Path | str | None]) -> None:
    """Refuses files that can't be written, or are one that is read, by whatever name, link or spelling.

    Args:
        option: that names them, for the message.
        files: their folders may be missing, and are made later.
        inputs: what is read, files or folders of them, by the options that name it; what is not there is
            passed over.

    Raises:
        ValueError: which file, and why.
    """
    known: dict[tuple[int, int], str] = {}
    for file in files:
        where = Path(os.path.realpath(file))
        if where.is_dir():
            raise ValueError(f"{option}: expected a file to write, got the folder {file}")
        _require_writable_folder(option, where.parent, f"file that can be written to, got {file}")
        if not where.exists():
            continue
        if not where.is_file() or not os.access(where, os.W_OK):
            raise ValueError(f"{option}: expected a file that can be written, got {file}")
        if not known:
            known = {_identity(path): f"{name}: {given}" for name, given, path in _read(inputs)}
        reads = known.setdefault(_identity(where), f"{option}: {file}")
        if reads != f"{option}: {file}":
            raise ValueError(f"{option}: expected a file of its own, got {file}, which is that of {reads}")


def check_folder(option: str, folder: Path, inputs: Mapping[str, Path | str | None]) -> None:
    """Refuses a folder that can't be made or written, or that is or holds something that is read.

    Args, Raises: as `check_files`.
    """
    where = Path(os.path.realpath(folder))
    if where.exists() and not where.is_dir():
        raise ValueError(f"{option}: expected a folder to write to, got the file {folder}")
    _require_writable_folder(option, where, f"folder that can be written to, got {folder}")
    for name, given in inputs.items():
        if given is None or not Path(given).exists():
            continue
        reads = Path(os.path.realpath(given))
        same = where.exists() and any(
            os.path.samefile(where, above) for above in (reads, *reads.parents) if above.exists()
        )
        if same:
            raise ValueError(
                f"{option}: expected a folder of its own, got {folder}, where {name}: {given} is read"
            )


def _require_writable_folder(option: str, folder: Path, asked: str) -> None:
    there = next(above for above in (folder, *folder.parents) if above.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "can't be written to" if there.is_dir() else "is no folder"
        raise ValueError(f"{option}: expected a {asked}; {there} {what}")


def _read(inputs: Mapping[str, Path | str | None]) -> Iterator[tuple[str, Path | str, Path]]:
    """Every file that is read: the option, what it names, the file."""
    for name, given in inputs.items():
        path = None if given is None else Path(given)
        if path is None or not path.exists():
            continue
        for file in path.rglob("*") if path.is_dir() else (path,):
            if file.is_file():
                yield name, path, file


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
