"""What this machine can run and, for what it can't, why.

The compiled ops are registered with torch when this module is imported. A build that is missing or does not
load is no error here: the reason is kept, and raised by the first call that would have run on it. Nothing
falls back to slower code by itself.

The environment variable STREAM_R1_EXTENSION names a folder with another build of the extension, such as the
one with sanitizers. STREAM_R1_EXTENSION=none runs without: "auto" takes the backends of plain torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dispatch import (
    ATTENTION_OPS,
    BACKENDS,
    DTYPES,
    FORWARD_ONLY,
    OPS,
    TRITON_OPS,
    Build,
    Call,
    Choice,
    arch_problem,
    choose,
    refusal,
)
from .schemas import GPU_SCHEMAS, SCHEMAS

_OLDEST_TRITON = (3, 6)

_WITHOUT = os.environ.get("STREAM_R1_EXTENSION") == "none"
_FOLDER = Path(os.environ.get("STREAM_R1_EXTENSION") or Path(__file__).parent)


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def read_build_record() -> dict[str, Any] | None:
    """What setup.py wrote beside the extension (torch, instruction sets, ops, what was left out), or None."""
    path = _FOLDER / "_build.json"
    return json.loads(path.read_text()) if path.exists() else None


def _load_extension() -> str | None:
    """Register the compiled ops; returns why that was not possible, or None."""
    if _WITHOUT:
        return "STREAM_R1_EXTENSION=none: the compiled extension is not loaded"
    found = sorted(_FOLDER.glob("_C*.so"))
    record = read_build_record()
    if not found and os.environ.get("STREAM_R1_EXTENSION"):
        return f"STREAM_R1_EXTENSION: expected a folder with the extension, _C*.so, got {_FOLDER}"
    if not found:
        return "the compiled extension is not built: run `pip install -e .` (or install a wheel)"
    if record is None or not record.keys() >= {"oldest_torch", "schemas"}:
        note = found[0].parent / "_build.json"
        return f"the compiled extension's {note} is missing or of an older build: build it again"
    oldest = record["oldest_torch"]
    built = f"the compiled extension, for torch {oldest} and later (built with {record['torch']})"
    if _release(torch.__version__) < _release(oldest):
        return f"{built}, can't be loaded with torch {torch.__version__}: install torch>={oldest}"
    expected = {*SCHEMAS, *(GPU_SCHEMAS if "cuda_archs" in record else ())}
    differ = sorted({schema.partition("(")[0] for schema in {*record["schemas"]} ^ expected})
    if differ:  # the kernels would take their arguments for others
        return (
            f"the compiled extension {found[0]} was built for another version of {', '.join(differ)} "
            "than this package's: build it again (`pip install -e .` in a checkout)"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:  # torch hides why
        why = error.__cause__ or error
        return f"{built}, could not be loaded with torch {torch.__version__}: {why}; build it again"
    return None


EXTENSION_PROBLEM = _load_extension()


def _triton_problem() -> str | None:
    """Why Triton's kernels can't be used, or None; found out without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'stream-r1[triton]'"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"Triton {version} is too old: {'.'.join(map(str, _OLDEST_TRITON))} or later is needed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    return None


def _find_unavailable() -> dict[str, str]:
    why = {} if (problem := _triton_problem()) is None else {"triton": problem}
    record = read_build_record() or {}
    if EXTENSION_PROBLEM is not None:
        why["cpu"] = why["cuda"] = EXTENSION_PROBLEM
    elif "cuda_archs" not in record:
        left_out = record.get("left_out", {}).get("cuda", "unknown")
        why["cuda"] = f"the CUDA kernels were left out of this build: {left_out}"
    elif torch.version.cuda is None:
        why["cuda"] = f"torch {torch.__version__} has no CUDA"
    return why


_UNAVAILABLE = _find_unavailable()
_CUDA_ARCHS: list[str] = (read_build_record() or {}).get("cuda_archs", [])


def _cudnn_version() -> int | None:
    try:
        return torch.backends.cudnn.version()
    except RuntimeError:  # not the one that torch was built with: it says so where cuDNN is used
        return None


_CUDNN = _cudnn_version()


# Looked up once: asking the dispatcher takes longer than a small op, and a compiled graph can't ask.
def _ops_of(key: str) -> frozenset[str]:
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return frozenset(name.removeprefix("stream_r1::") for name in names if name.startswith("stream_r1::"))


_OPS = {"cpu": _ops_of("CPU"), "cuda": _ops_of("CUDA"), "triton": TRITON_OPS}


@dataclass(frozen=True)
class _Gpu:
    capability: tuple[int, int]
    build: Build


_counted_for: _Gpu | None = None


@contextmanager
def picking_for(capability: tuple[int, int], build: Build) -> Iterator[None]:
    """Within it all tensors count as those of a GPU of this capability, with this build.

    For counting, on fake tensors, what a GPU would run. No kernel runs there that would not otherwise.
    """
    global _counted_for
    before, _counted_for = _counted_for, _Gpu(capability, build)
    try:
        yield
    finally:
        _counted_for = before


def device_type(tensor: Tensor) -> str:
    """ "cpu", "cuda", ...: what code that differs by device goes by."""
    return tensor.device.type if _counted_for is None else "cuda"


def build() -> Build:
    """What "auto" picks from on this machine."""
    return Build(_OPS, _CUDA_ARCHS, _UNAVAILABLE, _CUDNN) if _counted_for is None else _counted_for.build


def unavailable() -> dict[str, str]:
    """Why a backend can't be used here, by name; backends that are not in it can be."""
    why = dict(_UNAVAILABLE)
    for name in ("cuda", "triton"):
        if name not in why and not torch.cuda.is_available():
            why[name] = "torch finds no GPU"
    if "cuda" not in why:
        index = torch.cuda.current_device()
        capability, gpu = torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
        if (problem := arch_problem(_CUDA_ARCHS, capability, gpu)) is not None:
            why["cuda"] = problem
    return why


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int] | None:
    """Of a GPU; None where torch finds none: fake tensors may say that they are on one."""
    if _counted_for is not None:
        return _counted_for.capability
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


def describe_call(op: str, tensor: Tensor, *others: Tensor | None, pieces: int = 1) -> Call:
    """What a backend is picked by, of a call with these tensors; `tensor` gives dtype, device and width."""
    tensors = [tensor, *(x for x in others if x is not None)]
    device = device_type(tensor)
    return Call(
        op,
        device,
        tensor.dtype,
        head_dim=tensor.shape[-1] if op in ATTENTION_OPS else None,
        capability=_capability(tensor.device.index) if device == "cuda" else None,
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
        pieces=pieces,
        dense=all(x.stride(-1) == 1 for x in tensors if x.dim()),
    )


def explain(op: str, tensor: Tensor, *others: Tensor | None, pieces: int = 1) -> Choice:
    """What `backend="auto"` takes for a call, why, and why not what it would rather have had; print it.

    Args:
        op: such as "cached_chunk_attention".
        tensor: the op's first tensor; others: the rest, for what needs grad.
        pieces: of memory that an attention's keys lie in: 2 for a past and fresh keys beside it.

    Raises:
        ValueError: there is no such op.
    """
    if op not in OPS:
        raise ValueError(f"explain: op: expected one of {', '.join(OPS)}, got {op!r}")
    return choose(describe_call(op, tensor, *others, pieces=pieces), build())


def resolve(backend: str, op: str, tensor: Tensor, *others: Tensor | None, pieces: int = 1) -> str:
    """The backend that `op` runs on: "cpu", "cuda", "triton", "sdpa" or "reference".

    "auto" picks (see dispatch.py, and `explain`). A backend that is named is used or refused, never replaced.

    Raises:
        ValueError: the name is unknown, or the backend has no kernels for the tensor's size.
        RuntimeError: the backend can't be used on this machine, on the tensor's device, or for the op; for
            "auto", the extension is there to be loaded and can't be.
        TypeError: the backend has no kernels for the tensor's dtype.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        if (
            device_type(tensor) == "cpu"
            and tensor.dtype in DTYPES
            and "cpu" not in _UNAVAILABLE
            and not (op in FORWARD_ONLY and torch.is_grad_enabled())
        ):
            return "cpu" if op in _OPS["cpu"] else "reference"  # quicker than to choose; small ops feel it
        _refuse_a_broken_build(op, tensor)
        return choose(describe_call(op, tensor, *others, pieces=pieces), build()).backend
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    call = describe_call(op, tensor, *others, pieces=pieces)
    if (refused := refusal(backend, call, build())) is not None:
        kind, message = refused
        others_missing = [f"{name}: {why}" for name, why in _UNAVAILABLE.items() if name != backend]
        missing = "".join(f"; {each}" for each in others_missing) if backend in _UNAVAILABLE else ""
        raise kind(f"{op}: backend {backend!r} {message}{missing}")
    return backend


def _refuse_a_broken_build(op: str, tensor: Tensor) -> None:
    """Before "auto" takes what is slower because the extension is missing, which nobody asked for."""
    if EXTENSION_PROBLEM is None or _WITHOUT or _counted_for is not None:
        return
    if tensor.device.type in ("cpu", "cuda") and tensor.dtype in DTYPES:
        raise RuntimeError(
            f"{op}: backend 'auto': {EXTENSION_PROBLEM}. To run on plain torch, slower, set "
            "STREAM_R1_EXTENSION=none, or name a backend"
        )
