"""What is written is there whole or not at all, and what a killed process leaves is cleared by the next."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stream_r1.disk.processes import this_process
from stream_r1.disk.whole import clear_partial, write_text, written
from stream_r1.distill.checkpoint_files import save_checkpoint
from stream_r1.evaluation import Reference
from stream_r1.models.prompt_cache import PromptCache


def write_folder(path: Path) -> None:
    with written(path, replaces="*.bin") as place:
        place.mkdir()
        (place / "config.json").write_text("new")
        (place / "a.bin").write_bytes(b"n" * 9)


def entries(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def in_a_child(act: Callable[[], object]) -> int:
    """The status of a fork that acts and, if it survives that, ends."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed_amid(path: Path) -> None:
    def act() -> None:
        with written(path) as place:
            place.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_a_child(act)) == signal.SIGKILL


@contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """Files may not grow past a size: as on a full disk, a write fails (with EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_replaces_what_it_is_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_folder(path)
    (path / "old.bin").write_bytes(b"a shard of more")
    (path / "notes").mkdir()
    (path / "notes" / "mine.txt").write_text("mine")
    (path / "config.json").write_text("old")
    write_folder(path)
    assert entries(tmp_path) == {
        "model/config.json": b"new",
        "model/a.bin": b"n" * 9,
        "model/notes/mine.txt": b"mine",
    }


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "before")
    with pytest.raises(KeyError), written(tmp_path / "x") as place:  # noqa: PT012
        place.write_text("half")
        raise KeyError
    assert entries(tmp_path) == {"x": b"before"}
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_cleared_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "before")
    killed_amid(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "before"
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    with written(tmp_path / "other") as place:
        place.write_text("under way")
        write_text(tmp_path / "x", "after")
        (alive,) = tmp_path.glob(".*.partial")
        assert alive == place.parent
    assert entries(tmp_path) == {"x": b"after", "other": b"under way"}
    me = this_process()
    elsewhere = tmp_path / f".x.00000000-{me.pid}-{me.started}-0.partial"
    elsewhere.mkdir()
    (tmp_path / f".x.{me.place}-{me.pid}-{me.started + 1}-0.partial").mkdir()  # its number was given again
    clear_partial(tmp_path)
    assert list(tmp_path.glob(".*.partial")) == [elsewhere]
    os.utime(elsewhere, (0, 0))
    clear_partial(tmp_path)
    assert list(tmp_path.glob(".*.partial")) == []


def test_a_folder_whose_writer_was_killed_between_two_renames_is_completed(tmp_path: Path) -> None:
    place = tmp_path / f".model.{this_process().place}-999999999-1-0.partial"
    for name in ("before", "model"):
        (place / name).mkdir(parents=True)
        (place / name / "a").write_text(name)
    clear_partial(tmp_path)
    assert entries(tmp_path) == {"model/a": b"model"}


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "text": ("x.txt", lambda path: write_text(path, "0" * 5000)),
    "safetensors": ("x.safetensors", lambda path: save_file({"x": torch.zeros(5000)}, path)),
    "numpy": ("x.npz", lambda path: np.savez(path, x=np.zeros(5000))),
    "folder": ("model", write_folder),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_told_with_the_path(kind: str, tmp_path: Path) -> None:
    name, write = WRITERS[kind]
    path = tmp_path / name
    with full_disk(8), pytest.raises(OSError) as caught, written(path) as place:
        write(place)
    assert caught.value.filename == str(path)
    assert caught.value.errno
    assert list(tmp_path.iterdir()) == []


def test_those_that_write_tell_the_path_and_leave_what_was_there(tmp_path: Path) -> None:
    """A checkpoint, an embedding and statistics on a full disk."""
    cache = PromptCache(tmp_path / "prompts", "model")
    reference = Reference.fit([torch.rand(3, 3, 32, 32)])
    tensors = {"a": {"x": torch.zeros(5000)}}
    cases: list[tuple[Path, Callable[[], object]]] = [
        (tmp_path / "step-00000002.safetensors", lambda: save_checkpoint(tmp_path, 2, tensors, {})),
        (cache.path("a prompt"), lambda: cache.put("a prompt", torch.zeros(500, 9))),
        (tmp_path / "statistics.safetensors", lambda: reference.save(tmp_path / "statistics.safetensors")),
    ]
    save_checkpoint(tmp_path, 1, tensors, {})
    for path, act in cases:
        with full_disk(1000), pytest.raises(OSError) as caught:
            act()
        assert caught.value.filename == str(path)
        assert not path.exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["prompts", "step-00000001.safetensors"]
    for path, act in cases:
        act()
        assert path.exists()
