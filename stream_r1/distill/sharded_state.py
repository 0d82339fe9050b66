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
import math
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from stream_r1.disk.whole import flush
from stream_r1.distill.checkpoint_files import (
    FORMAT,
    clear_left_over,
    flatten,
    publish,
    require_format,
    unflatten,
)
from stream_r1.distill.ranks import Ranks
from stream_r1.distill.verification import (
    CheckpointError,
    DamagedCheckpointError,
    describe,
    parse_values,
    require_as_written,
    require_names,
)
from stream_r1.messages import first_line, shown, some

_VALUES = "values.json"

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
        self._pending: tuple[Future[Any], Path, dict[str, Any], dict[str, Any]] | None = None
        self._background: dist.ProcessGroup | None = None

    def save(
        self, step: int, parts: dict[str, dict[str, Tensor]], values: dict[str, Any], *, spare: bool = False
    ) -> Path:
        """Writes step-<step> and returns when it is complete; `spare` removes no older one."""
        self.finish()
        path = self._path(step)
        if self.ranks.broadcast(_holds(path, values)):
            return path
        partial, tensors = self._begin(path), flatten(parts)
        told = describe(tensors, self.ranks)
        save(dict(tensors), storage_writer=_writer(partial))
        self._publish(path, values, told, None if spare else self.keep)
        return path

    def begin(self, step: int, parts: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
        """Copies everything to host memory and writes it in the background; `finish` completes it."""
        self.finish()
        path = self._path(step)
        partial, tensors = self._begin(path), flatten(parts)
        told = describe(tensors, self.ranks)
        if self._background is None:  # messages of its own, so as not to meet the training's
            self._background = dist.new_group(backend="gloo")
        future = async_save(dict(tensors), storage_writer=_writer(partial), process_group=self._background)
        if not isinstance(future, Future):
            future.staging_completion.result()  # the copy is made: the caller may change everything
            future = future.upload_completion
        self._pending = future, path, values, told

    def finish(self, *, wait: bool = True) -> Path | None:
        """Completes what `begin` began; None if nothing was, or it is still running and `wait` is False."""
        if self._pending is None:
            return None
        future, path, values, told = self._pending
        if not wait and self.ranks.any(not future.done()):
            return None
        future.result()
        self._pending = None
        self._publish(path, values, told, self.keep)
        return path

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _begin(self, path: Path) -> Path:
        partial = _partial(path)
        if self.ranks.is_main:
            clear_left_over(self.folder)
            partial.mkdir()
        self.ranks.barrier()
        return partial

    def _publish(self, path: Path, values: dict[str, Any], tensors: dict[str, Any], keep: int | None) -> None:
        """Every rank has written; a checkpoint of the same step gives way."""
        self.ranks.barrier()
        if self.ranks.is_main:
            partial = _partial(path)
            files = {file.name: file.stat().st_size for file in sorted(partial.glob("*.safetensors"))}
            told = json.dumps({"format": FORMAT, "files": files, "tensors": tensors, "values": values})
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
        DamagedCheckpointError: it is not what was written; on all ranks.
        CheckpointError: it is in another format.
    """
    path = Path(path)
    problem, told = ranks.broadcast(_inspected(path) if ranks.is_main else (None, {}))
    if problem is not None:
        raise problem
    try:
        reader = HuggingFaceStorageReader(str(path))
        tensors: dict[str, Any] = {}
        for key, meta in reader.read_metadata().state_dict_metadata.items():
            tensors[key] = _empty(like(key, meta.size), meta.size, meta.properties.dtype)  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads it alone is meant
            load(tensors, storage_reader=reader, no_dist=not ranks.launched)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise DamagedCheckpointError(f"{path}: not a readable checkpoint: {first_line(error)}") from None
    if "tensors" in told:
        require_as_written(tensors, told["tensors"], str(path), ranks)
    return unflatten(tensors), told["values"]


def _inspected(path: Path) -> tuple[CheckpointError | None, dict[str, Any]]:
    """What values.json says, and what speaks against reading the files beside it."""
    try:
        return None, _inspect(path)
    except CheckpointError as error:
        return error, {}


def _inspect(path: Path) -> dict[str, Any]:
    if not (path / _VALUES).is_file():
        raise DamagedCheckpointError(f"{path}: expected a checkpoint's folder with {_VALUES}, found none")
    try:
        told = parse_values((path / _VALUES).read_text(encoding="utf-8"), f"{path / _VALUES}")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(f"{path / _VALUES}: {error}") from None
    if not isinstance(told, dict):
        raise DamagedCheckpointError(f"{path / _VALUES}: expected keys and values, got {shown(told)}")
    require_format(told.get("format"), path / _VALUES)
    files = told.get("files")
    if not isinstance(files, dict) or "values" not in told:
        raise DamagedCheckpointError(f"{path / _VALUES}: expected files and values, found {some(told)}")
    require_names({file.name: file for file in path.glob("*.safetensors")}, files, f"{path}: files")
    for name, size in files.items():
        there = (path / name).stat().st_size if (path / name).is_file() else None
        if there != size:
            raise DamagedCheckpointError(f"{path}: {name}: expected {shown(size)} bytes, got {there}")
        try:
            with safe_open(path / name, framework="pt"):
                pass  # the header fits the file; torch's own reader believes whatever it says
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpointError(f"{path}: {name}: {first_line(error)}") from None
    try:
        pieces = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except Exception as error:  # torch's parser believes what it reads
        raise DamagedCheckpointError(f"{path}: not a readable checkpoint: {first_line(error)}") from None
    for key, meta in pieces.items():
        _require_whole(meta, f"{path}: {key}")
    if "tensors" in told:
        if not isinstance(told["tensors"], dict):
            raise DamagedCheckpointError(f"{path / _VALUES}: tensors: expected names and what they are")
        require_names(pieces, told["tensors"], str(path))
    return told


def _require_whole(meta: Any, what: str) -> None:
    """Refuses pieces that leave out some of a tensor, or lie beside it: nothing would be read there."""
    size = list(meta.size)
    places = {tuple(piece.offsets) for piece in meta.chunks}
    inside = all(
        len(piece.offsets) == len(size)
        and all(
            at >= 0 and at + length <= n
            for at, length, n in zip(piece.offsets, piece.sizes, size, strict=True)
        )
        for piece in meta.chunks
    )
    covered = sum(math.prod(piece.sizes) for piece in meta.chunks)
    if not inside or len(places) != len(meta.chunks) or covered != math.prod(size):
        expected = f"pieces that make up {shown(size)}"
        got = some(f"{shown(list(piece.sizes))} at {shown(list(piece.offsets))}" for piece in meta.chunks)
        raise DamagedCheckpointError(f"{what}: expected {expected}, got {got}")


def _empty(like: Tensor | None, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory for a tensor; what nothing is read to is not a finite number."""
    made = torch.empty(size, dtype=dtype) if like is None else torch.empty_like(like, dtype=dtype)
    return made.fill_(torch.nan) if made.is_floating_point() else made


def _holds(path: Path, values: dict[str, Any]) -> bool:
    """Whether a checkpoint of this very state is there: stopping right after an interval asks twice."""
    try:
        return _inspect(path)["values"] == _plain(values)
    except CheckpointError:
        return False


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _writer(partial: Path) -> HuggingFaceStorageWriter:
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)
    return HuggingFaceStorageWriter(str(partial), save_distributed=True)
