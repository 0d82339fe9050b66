"""One process a folder: the second is refused and told who has it; who was killed has nothing."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from stream_r1.disk.lock import LOCK, OWNER, FolderInUseError, folder_lock
from stream_r1.disk.processes import this_process
from stream_r1.distill.checkpoint_files import list_checkpoints, save_checkpoint


@contextmanager
def holder(folder: Path) -> Iterator[int]:
    """Another process that has the folder."""
    child = os.fork()
    if child == 0:
        try:
            with folder_lock(folder):
                (folder / "ready").touch()
                time.sleep(60)
        finally:
            os._exit(1)
    while not (folder / "ready").exists():
        time.sleep(0.005)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        (folder / "ready").unlink()


def pretend(folder: Path, **changes: object) -> None:
    """A text that a process left."""
    folder.mkdir(exist_ok=True)
    said = this_process()._asdict() | {"since": "yesterday"} | changes
    (folder / OWNER).write_text(json.dumps(said))


def test_a_second_process_is_told_who_has_it_and_a_killed_one_has_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as pid:
        told = rf"{tmp_path}: in use by process {pid} on "
        with pytest.raises(FolderInUseError, match=told), folder_lock(tmp_path, take_over=True):
            pass
        owner = (tmp_path / OWNER).read_text()
        pretend(tmp_path, pid=999_999_999)  # as if the holder had not written yet over what another left
        later = threading.Timer(0.2, (tmp_path / OWNER).write_text, [owner])
        later.start()
        with pytest.raises(FolderInUseError, match=f"process {pid} "):
            save_checkpoint(tmp_path, 1, {}, {})
        later.join()
    assert (tmp_path / OWNER).exists()  # it was killed
    with folder_lock(tmp_path), folder_lock(tmp_path / ".." / tmp_path.name):
        save_checkpoint(tmp_path, 1, {"a": {"x": torch.zeros(1)}}, {})
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == list_checkpoints(tmp_path)


@pytest.mark.parametrize(
    "left", [{"pid": 999_999_999}, {"started": 1}, {"pid": "?"}, {"pid": os.getpid(), "started": 0}]
)
def test_a_text_of_a_process_that_is_gone_means_nothing(left: dict, tmp_path: Path) -> None:
    pretend(tmp_path, **left)
    with folder_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_living_process_without_the_system_s_lock_is_believed(tmp_path: Path) -> None:
    """Some networks' disks keep no locks: what a process wrote beside it counts by itself."""
    with holder(tmp_path) as pid:
        (tmp_path / LOCK).unlink()
        with pytest.raises(FolderInUseError, match=f"process {pid} "), folder_lock(tmp_path):
            pass


def test_a_process_of_another_machine_is_overridden_explicitly(tmp_path: Path) -> None:
    pretend(tmp_path, host="elsewhere", place="00000000")
    told = r"on elsewhere since yesterday.*--take-over.*in-use\.json"
    with pytest.raises(FolderInUseError, match=told), folder_lock(tmp_path):
        pass
    pretend(tmp_path / "below", host="elsewhere", place="00000000")
    with folder_lock(tmp_path, take_over=True), folder_lock(tmp_path / "below"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["below"]


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(NotADirectoryError) as caught, folder_lock(tmp_path / "run"):
        pass
    assert caught.value.filename == str(tmp_path / "run")
