"""Checkpoints that several processes write together, each its own part.

A folder step-<step> with safetensors files, in the layout of torch's distributed checkpoints (every file
says where its pieces belong), and values.json, which also names the files. Nothing in it can run code. Any
number of processes can read it, one included. It is written beside its place and renamed by the first rank
when every rank has flushed its part, so processes killed at any moment leave the previous checkpoint as it
was. Ranks on several machines need a folder that all of them see.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from stream_r1.disk.whole import flush
from stream_r1.distill.ranks import Ranks
from stream_r1.distill.state import CheckpointError, clear_left_over, flatten, publish, unflatten

_VALUES = "values.json"
_FORMAT = "1"

Like = Callable[[str, torch.Size], Tensor | None]
"""From a tensor's key and its whole shape to a parameter that is divided as it is, if there is one."""


class SharedCheckpoints:
    """Writes checkpoints of all ranks into one folder; every rank must make the same calls.

    Args:
        folder: where they go.
        keep: how many are kept, besides those that `save` is told to spare.
        ranks: who writes.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks) -> None:
        self.folder = folder
        self.keep = keep
        self.ranks = ranks
        self._pending: tuple[Future[Any], Path, dict[str, Any]] | None = None
        self._background: dist.ProcessGroup | None = None

    def save(
        self, step: int, parts: dict[str, dict[str, Tensor]], values: dict[str, Any], *, spare: bool = False
    ) -> Path:
        """Writes step-<step> and returns when it is complete; `spare` removes no older one."""
        self.finish()
        path = self._path(step)
        if self.ranks.from_first(_holds(path, values)):
            return path
        partial = self._begin(path)
        save(dict(flatten(parts)), storage_writer=_writer(partial))
        self._publish(path, values, None if spare else self.keep)
        return path

    def begin(self, step: int, parts: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
        """Copies everything to host memory and writes it while the caller goes on; `finish` completes it."""
        self.finish()
        path = self._path(step)
        partial = self._begin(path)
        if self._background is None:  # messages of its own, so as not to meet the training's
            self._background = dist.new_group(backend="gloo")
        future = async_save(
            dict(flatten(parts)), storage_writer=_writer(partial), process_group=self._background
        )
        if not isinstance(future, Future):
            future.staging_completion.result()  # the copy is made: the caller may change everything
            future = future.upload_completion
        self._pending = future, path, values

    def finish(self, *, wait: bool = True) -> Path | None:
        """Completes what `begin` began; None if nothing was, or it still goes on and `wait` is False."""
        if self._pending is None:
            return None
        future, path, values = self._pending
        if not wait and self.ranks.any(not future.done()):
            return None
        future.result()
        self._pending = None
        self._publish(path, values, self.keep)
        return path

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _begin(self, path: Path) -> Path:
        partial = _partial(path)
        if self.ranks.first:
            clear_left_over(self.folder)
            partial.mkdir()
        self.ranks.barrier()
        return partial

    def _publish(self, path: Path, values: dict[str, Any], keep: int | None) -> None:
        """Every rank has written; a checkpoint of the same step gives way."""
        self.ranks.barrier()
        if self.ranks.first:
            partial = _partial(path)
            files = {file.name: file.stat().st_size for file in sorted(partial.glob("*.safetensors"))}
            told = json.dumps({"format": _FORMAT, "files": files, "values": values})
            (partial / _VALUES).write_text(told, encoding="utf-8")
            flush(partial / _VALUES)
            if path.exists():
                path.rename(path.with_name(f".{path.name}.before.partial"))
            publish(partial, path, keep=keep)
        self.ranks.barrier()


def load_shared_checkpoint(
    path: Path | str, like: Like, ranks: Ranks
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Parts and values of a checkpoint folder, every rank reading what it needs of it.

    Raises:
        CheckpointError: it is not one, or is damaged.
    """
    path = Path(path)
    try:
        told = json.loads((path / _VALUES).read_text(encoding="utf-8"))
        if told["format"] != _FORMAT:
            raise CheckpointError(f"{path}: not a checkpoint of a trainer (format {told['format']!r})")
        for name, size in told["files"].items():
            there = (path / name).stat().st_size if (path / name).is_file() else None
            if there != size:
                raise CheckpointError(f"{path}: {name}: expected {size} bytes, got {there}")
        reader = HuggingFaceStorageReader(str(path))
        tensors: dict[str, Any] = {}
        for key, meta in reader.read_metadata().state_dict_metadata.items():
            tensors[key] = _empty(like(key, meta.size), meta.size, meta.properties.dtype)  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads it alone is meant
            load(tensors, storage_reader=reader, no_dist=not ranks.launched)
    except (OSError, KeyError, ValueError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
    return unflatten(tensors), told["values"]


def _empty(like: Tensor | None, size: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype) if like is None else torch.empty_like(like, dtype=dtype)


def _holds(path: Path, values: dict[str, Any]) -> bool:
    """Whether a checkpoint of this very state is there: stopping right after an interval asks twice."""
    there = path / _VALUES
    return there.is_file() and json.loads(there.read_text(encoding="utf-8"))["values"] == _plain(values)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _writer(partial: Path) -> HuggingFaceStorageWriter:
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)
    return HuggingFaceStorageWriter(str(partial), save_distributed=True)
