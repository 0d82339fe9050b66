"""One run a folder: a lock that says who holds it, and that a killed process does not hold."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from stream_r1.disk.processes import Process, this_process
from stream_r1.disk.whole import write_text

LOCK = ".in-use.lock"
OWNER = ".in-use.json"


class FolderInUseError(RuntimeError):
    """Another process works in a folder, or seems to."""


@dataclass(frozen=True)
class _Held:
    pid: int
    take_over: bool


_held: dict[Path, _Held] = {}


@contextmanager
def folder_lock(folder: str | Path, *, take_over: bool = False) -> Iterator[None]:
    """The folder, which is made, is this process's for as long as the context lasts.

    The lock itself is the operating system's and ends with the process, however that ends; beside it lies who
    holds it. Inside of one another, in one process, they are one.

    Args:
        take_over: also from a process of another machine, which can't be seen from here.

    Raises:
        FolderInUseError: a process has it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder, there is a file", str(folder))
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if key in _held and _held[key].pid == os.getpid():
        yield
        return
    above = (_held[parent] for parent in key.parents if parent in _held)
    take_over = take_over or any(held.take_over and held.pid == os.getpid() for held in above)
    lock = FileLock(folder / LOCK)
    _acquire(lock, folder)
    try:
        _refuse_another(folder, take_over)
        me, since = this_process(), datetime.now().astimezone().isoformat(" ", "seconds")
        write_text(folder / OWNER, json.dumps(me._asdict() | {"since": since}) + "\n")
        _held[key] = _Held(me.pid, take_over)
        try:
            yield
        finally:
            _held.pop(key, None)
            (folder / OWNER).unlink(missing_ok=True)
            (folder / LOCK).unlink(missing_ok=True)
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # a run that came to nothing leaves no empty folder behind
            for path in made:
                path.rmdir()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
        while not (folder / LOCK).exists():  # its last holder removed it while it was opened here
            lock.release()
            lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUseError(
            f"{folder}: in use by {_told(_holder(folder))}: wait for it, stop it, or name another folder"
        ) from None
    except NotImplementedError:  # a disk without locks: what lies beside has to do
        return
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise OSError(error.errno, os.strerror(error.errno or 0), str(folder)) from error


def _refuse_another(folder: Path, take_over: bool) -> None:
    """Beyond the operating system's lock, which is not kept between machines on every network's disk."""
    owner = _owner(folder)
    if owner is None or take_over:
        return
    process = owner[0]
    if not process.here:
        raise FolderInUseError(
            f"{folder}: in use by {_told(owner)}, which can't be seen from here: if it is gone, "
            f"--take-over takes the folder over (or remove {folder / OWNER})"
        )
    if not process.gone and process.pid != os.getpid():
        raise FolderInUseError(f"{folder}: in use by {_told(owner)}: wait for it, or stop it")


def _holder(folder: Path) -> tuple[Process, str] | None:
    """Who has the lock: it writes that down a moment later, over what one that is gone may have left."""
    for _ in range(40):
        owner = _owner(folder)
        if owner is not None and not (owner[0].here and owner[0].gone):
            return owner
        time.sleep(0.05)
    return None


def _owner(folder: Path) -> tuple[Process, str] | None:
    try:
        said = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        process = Process(str(said["host"]), str(said["place"]), int(said["pid"]), int(said["started"]))
        return process, str(said["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _told(owner: tuple[Process, str] | None) -> str:
    if owner is None:
        return "another process"
    process, since = owner
    return f"process {process.pid} on {process.host} since {since}"
