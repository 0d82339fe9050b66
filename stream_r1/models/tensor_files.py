"""Files of tensors, read without running code and without spending more than what is in them.

`.safetensors`, and `.pt`, `.pth`, `.bin`, `.ckpt` of torch, of which nothing is unpickled but tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from stream_r1.files import FileError, require_file
from stream_r1.messages import first_line, some

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

_MOST_PICKLED = 2**26  # bytes of the pickle in an archive, which names tensors
_MOST_SHARED = 4  # times that the tensors of a file may have the bytes of it, where they share memory
_UNREADABLE = "{}: expected tensors, readable without running code; damaged, or holds more than tensors"
_ZIP, _TAR_AT, _TAR = b"PK\x03\x04", 257, b"ustar"


def read_file(path: Path) -> dict[str, Any]:
    """What a file of tensors holds, on the CPU.

    Raises:
        OSError: it is not there.
        FileError: the file is damaged, needs code to be read, or holds no state dict.
    """
    size = require_file(path, "a file of tensors")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise FileError(f"{path}: expected tensors in safetensors; {first_line(error)}") from None
    archive = require_plain(path, size)
    try:
        # Mapped, not read: of three networks one is wanted. Files of an old torch are no archives.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except OSError:
        raise
    except Exception:  # what is no pickle at all can raise anything; torch's words are advice to run it
        raise FileError(_UNREADABLE.format(path)) from None
    if not isinstance(content, Mapping):
        raise FileError(f"{path}: expected a state dict, got {type(content).__name__}")
    _require_stored(content, size, path)
    return dict(content)


@contextmanager
def opened(path: str | Path, what: str) -> Iterator[Any]:
    """A `.safetensors` file whose parts are read one by one.

    Raises:
        OSError: it is not there.
        FileError: it is no `what`, or lacks what is read of it.
    """
    require_file(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise FileError(f"{path}: not a readable {what}: {first_line(error)}") from None


def shapes_in(path: Path) -> dict[str, list[int]]:
    """By name the shapes in a `.safetensors` file, from its header."""
    with opened(path, ".safetensors file") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def require_finite(tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Raises FileError where weights are nan or infinite."""
    bad = [name for name, t in tensors if t.is_floating_point() and not _is_finite(t)]
    if bad:
        raise FileError(f"{source}: expected finite numbers, got nan or infinite ones in {some(bad)}")


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # torch asks no number of 8 bits
    return bool(wide.isfinite().all())


def require_plain(path: Path, size: int) -> bool:
    """Whether a file of torch is an archive. Raises FileError where it holds more than its own bytes."""
    with path.open("rb") as file:
        begins = file.read(_TAR_AT + len(_TAR))
    if begins[_TAR_AT:] == _TAR:
        raise FileError(f"{path}: expected a file of torch 1.6 or later, got a tar archive of an old one")
    if not begins.startswith(_ZIP):
        return False
    try:
        with ZipFile(path) as archive:
            entries = archive.infolist()
    except (BadZipFile, ValueError, NotImplementedError, EOFError):
        raise FileError(_UNREADABLE.format(path)) from None
    compressed = [
        e.filename for e in entries if e.compress_type != ZIP_STORED or e.file_size != e.compress_size
    ]
    if compressed:
        raise FileError(
            f"{path}: expected an archive of torch, uncompressed, got {some(compressed)} compressed"
        )
    if len({e.filename for e in entries}) < len(entries) or sum(e.file_size for e in entries) > size:
        raise FileError(f"{path}: expected an archive of torch, got one with parts that overlap")
    pickled = [e for e in entries if e.filename.endswith(".pkl")]
    if any(e.file_size > _MOST_PICKLED for e in pickled):
        raise FileError(f"{path}: expected a pickle of at most {_MOST_PICKLED} bytes that names the tensors")
    return True


def _require_stored(content: Mapping[Any, Any], size: int, path: Path) -> None:
    """Refuses tensors that have more numbers than are stored, as those of a stride of 0 have."""
    total, waiting = 0, [("", content)]
    while waiting:
        under, values = waiting.pop()
        for name, value in values.items():
            if isinstance(value, Mapping):
                waiting.append((f"{under}{name}.", value))
            elif isinstance(value, Tensor):
                if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                    raise FileError(f"{path}: {under}{name}: expected a plain tensor, got {_kind(value)}")
                total += value.numel() * value.element_size()
                if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                    got = f"{list(value.shape)} of {value.untyped_storage().nbytes()} bytes"
                    raise FileError(f"{path}: {under}{name}: expected a number for each place, got {got}")
    if total > _MOST_SHARED * size:
        raise FileError(f"{path}: expected at most {_MOST_SHARED * size} bytes of tensors, got {total}")


def _kind(value: Tensor) -> str:
    if value.device.type != "cpu":
        return f"one on {value.device}"
    return "a quantized one" if value.is_quantized else f"a {str(value.layout).removeprefix('torch.')} one"
