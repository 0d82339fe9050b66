"""Checkpoints as files, whole or not there.

A checkpoint of one process is one safetensors file: every tensor under "<part>/<name>", everything else as
JSON in its metadata. (Several processes write a folder of them, see `sharded_state`.) Nothing in it can run
code. It is written beside its place, flushed to disk and then renamed, so a process killed at any moment
leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stream_r1.disk.lock import folder_lock
from stream_r1.disk.whole import clear_partial, flush, flush_names, remove, written
from stream_r1.distill.verification import (
    CheckpointError,
    DamagedCheckpointError,
    describe,
    parse_values,
    require_as_written,
)
from stream_r1.messages import first_line, shown

_NAME = re.compile(r"step-(\d{8})(\.safetensors)?")
FORMAT = "1"


def save_checkpoint(
    folder: Path | str,
    step: int,
    parts: dict[str, dict[str, Tensor]],
    values: dict[str, Any],
    *,
    keep: int | None = 2,
) -> Path:
    """Writes step-<step>.safetensors atomically and then removes all but the `keep` newest (None: keeps all).

    Args:
        parts: tensors, by part and name; names may hold "/".
        values: whatever JSON can hold.

    Raises:
        FolderInUseError: another process writes there.
        OSError: it can't be written, as on a full disk; what was there stays.
    """
    folder = Path(folder)
    with folder_lock(folder):
        clear_left_over(folder)
        tensors = {key: t.contiguous() for key, t in flatten(parts).items()}
        path = folder / f"step-{step:08d}.safetensors"
        told = {"values": json.dumps(values), "tensors": json.dumps(describe(tensors))}
        with written(path, clear=False) as partial:
            save_file(tensors, partial, metadata={"format": FORMAT} | told)
        remove_old(folder, keep)
    return path


def load_checkpoint(path: Path | str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Parts and values of a checkpoint.

    Raises:
        DamagedCheckpointError: it is not what was written.
        CheckpointError: it is in another format.
    """
    tensors: dict[str, Tensor] = {}
    if not Path(path).is_file():
        raise DamagedCheckpointError(f"{path}: expected a file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                tensors[key] = file.get_tensor(key)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: not a readable checkpoint: {first_line(error)}") from None
    require_format(metadata.get("format"), path)
    values = parse_values(metadata.get("values"), f"{path}: values")
    if "tensors" in metadata:
        require_as_written(tensors, parse_values(metadata["tensors"], f"{path}: tensors"), str(path))
    return unflatten(tensors), values


def require_format(found: object, path: Path | str) -> None:
    """Refuses what no trainer, or another version of this package, wrote."""
    if found != FORMAT:
        kind = CheckpointError if isinstance(found, str) and found.isdigit() else DamagedCheckpointError
        raise kind(f"{path}: format: expected {FORMAT!r} of a trainer's checkpoint, got {shown(found)}")


def list_checkpoints(folder: Path | str) -> list[Path]:
    """Complete checkpoints in a folder, oldest first; empty if there is no such folder."""
    folder = Path(folder)
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def step_of(path: Path | str) -> int | None:
    """The step in a checkpoint's name; None: it has another name."""
    found = _NAME.fullmatch(Path(path).name)
    return int(found[1]) if found else None


def flatten(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by part and name -> by "<part>/<name>"."""
    return {f"{part}/{name}": t.detach() for part, named in parts.items() for name, t in named.items()}


def unflatten(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `flatten`: the first "/" divides."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    return parts


def rename_damaged(path: Path) -> Path:
    """Gives a damaged checkpoint a name that is none of a checkpoint's; nothing is removed."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    os.replace(path, aside)
    flush_names(path.parent)
    return aside


def clear_left_over(folder: Path) -> None:
    """Makes a folder for checkpoints, without what killed processes left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_partial(folder, everything=True)
    for left_over in folder.glob(".tmp*"):  # of safetensors itself, as earlier versions had it write there
        remove(left_over)


def publish(partial: Path, path: Path, *, keep: int | None) -> None:
    """Gives a complete checkpoint its name, and then removes all but the `keep` newest (None: keeps all)."""
    flush(partial)
    os.replace(partial, path)
    flush_names(path.parent)  # the rename itself
    remove_old(path.parent, keep)


def remove_old(folder: Path, keep: int | None) -> None:
    """Removes all checkpoints but the `keep` newest; None: none."""
    for old in list_checkpoints(folder)[:-keep] if keep is not None else ():
        # A folder goes in many steps: under a name that is not a checkpoint's.
        gone = old.with_name(f".{old.name}.partial")
        os.replace(old, gone)
        remove(gone)
