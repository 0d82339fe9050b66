"""Files and folders that appear whole or not at all, whatever ends the process that writes them.

They are written beside their place, in a folder `.NAME.PROCESS.partial`, flushed to the disk and renamed. So
a process that is killed leaves what was there before, and a folder whose name tells whose it is: the next
one that writes there removes it.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from stream_r1.disk.processes import Process, this_process

_NAME = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-(\d+)-\d+\.partial")
_ABANDONED = 86_400.0  # seconds, of a process on another machine
_BEFORE = "before"  # what a folder replaces, in the moment in between
_numbers = itertools.count()


@contextmanager
def written(path: str | Path, *, replaces: str = "*", clear: bool = True) -> Iterator[Path]:
    """Yields where to write what is to be at `path`, a file or a folder, under the same name.

    It takes the place of what is there when the context ends, and of nothing if an error ends it. Folders
    that lead there are made.

    Args:
        replaces: of a folder that is there, what is not written again and does not match stays: a model's
            folder may hold more than the model.
        clear: look for what killed processes left in that folder; False where it has very many files.

    Raises:
        OSError: it can't be written; `filename` is `path`.
    """
    path = Path(path)
    try:
        if path.is_symlink():
            path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        if clear:
            clear_partial(path.parent)
        place = _private_folder(path)
        try:
            yield place / path.name
            _carry_over(path, place / path.name, replaces)
            flush(place / path.name)
            _put(place, path)
            flush_names(path.parent)  # the rename itself
        finally:
            shutil.rmtree(place, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _about(path, error) from error


def write_text(path: str | Path, text: str) -> None:
    """A text file in UTF-8, whole or not at all."""
    with written(path) as place:
        place.write_text(text, encoding="utf-8")


def clear_partial(folder: Path, *, everything: bool = False) -> None:
    """Removes what processes that are gone left in a folder.

    Args:
        everything: of any process but this one: the caller knows that no other writes there.
    """
    for left_over in folder.glob(".*.partial"):
        if everything or _abandoned(left_over):
            _complete(left_over)
            remove(left_over)


def remove(path: Path) -> None:
    """A file or a whole folder; nothing if somebody else was quicker."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file, or a folder with everything in it, is on the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            if not entry.is_symlink() and (entry.is_dir() or entry.is_file()):
                flush(entry)
    flush_names(path)


def flush_names(path: Path) -> None:
    """Waits until a file, or a folder's list of what is in it, is on the disk: others' files may be there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _private_folder(path: Path) -> Path:
    me = this_process()
    place = path.with_name(f".{path.name}.{me.place}-{me.pid}-{me.started}-{next(_numbers)}.partial")
    place.mkdir()
    return place


def _carry_over(old: Path, new: Path, replaces: str) -> None:
    """Gives a new folder what the old one keeps."""
    for entry in old.iterdir() if old.is_dir() and new.is_dir() else ():
        if not (new / entry.name).exists() and not fnmatch(entry.name, replaces):
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
            else:
                _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    """The same file under another name, or a copy where a disk has one name a file."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _put(place: Path, path: Path) -> None:
    """A file replaces what is there at once; a folder in two renames, which `_complete` completes."""
    new = place / path.name
    if new.is_dir() and path.is_dir():
        os.rename(path, place / _BEFORE)
        os.rename(new, path)
    else:
        os.replace(new, path)


def _complete(place: Path) -> None:
    name = _target(place.name)
    if name and (place / _BEFORE).exists() and (place / name).exists():
        target = place.with_name(name)
        if not target.exists():
            os.rename(place / name, target)


def _target(name: str) -> str:
    """What a folder of ours is for; nothing for other names."""
    found = _NAME.fullmatch(name)
    return name[1 : found.start(1) - 1] if found else ""


def _abandoned(place: Path) -> bool:
    found = _NAME.fullmatch(place.name)
    if not found:
        return False
    writer = Process("", found[1], int(found[2]), int(found[3]))
    if writer.here:
        return writer.gone
    try:
        return time.time() - place.stat().st_mtime > _ABANDONED
    except OSError:  # it is gone by now
        return False


def _about(path: Path, error: OSError | SafetensorError) -> OSError:
    """The same with the path that the caller knows, not that of a part of it."""
    number = error.errno if isinstance(error, OSError) else None
    said = re.search(r"\(os error (\d+)\)", str(error))
    if number is None and said:  # safetensors has the number in its words alone
        number = int(said[1])
    if number is None:
        return OSError(f"{path}: {error}")
    return OSError(number, os.strerror(number), str(path))
