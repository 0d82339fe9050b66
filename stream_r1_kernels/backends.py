"""What this machine can run and, for what it can't, why.

The compiled ops are registered with torch when this module is imported. A build that is missing, or that was
made against another torch, is no error here: the reasons are kept, `backend="reference"` works, and asking
for a compiled backend raises with them.

The environment variable STREAM_R1_EXTENSION names a folder with another build of the extension, such as the
one with sanitizers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_FOLDER = Path(os.environ.get("STREAM_R1_EXTENSION") or Path(__file__).parent)


def _public(version: str) -> str:
    return version.split("+")[0]


def read_build_record() -> dict[str, Any] | None:
    """What setup.py wrote beside the extension (torch, instruction sets, what was left out), or None."""
    path = _FOLDER / "_build.json"
    return json.loads(path.read_text()) if path.exists() else None


def _load_extension() -> str | None:
    """Register the compiled ops; returns why that was not possible, or None."""
    found = sorted(_FOLDER.glob("_C*.so"))
    record = read_build_record()
    if not found or record is None:
        return "the compiled extension is not built: run `pip install -e .` (or install a wheel)"
    if _public(record["torch"]) != _public(torch.__version__):
        return (
            f"the compiled extension was built against torch {record['torch']} but torch {torch.__version__} "
            "is running: rebuild it with `pip install -e . --no-build-isolation`"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"the compiled extension could not be loaded: {error}"
    return None


EXTENSION_PROBLEM = _load_extension()


def _find_unavailable() -> dict[str, str]:
    why = {
        "cuda": (read_build_record() or {}).get("left_out", {}).get("cuda", "the CUDA kernels are not built"),
        "triton": "this version has no Triton kernels yet",
    }
    if EXTENSION_PROBLEM is not None:
        why["cpu"] = EXTENSION_PROBLEM
    return why


_UNAVAILABLE = _find_unavailable()

# Looked up once: asking the dispatcher takes longer than a small op, and a compiled graph can't ask.
_CPU_OPS = frozenset(
    name.removeprefix("stream_r1::")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    if name.startswith("stream_r1::")
)


def unavailable() -> dict[str, str]:
    """Why a backend can't be used here, by name; backends that are not in it can be."""
    return dict(_UNAVAILABLE)


def resolve(backend: str, op: str, tensor: Tensor) -> str:
    """The backend that `op` runs on: "cpu" or "reference".

    "auto" takes the compiled kernels for CPU tensors of a supported dtype and the reference for everything
    else. A backend that is named is used or refused, never replaced.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend can't be used on this machine, or not on the tensor's device.
        TypeError: the backend has no kernels for the tensor's dtype.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        usable = EXTENSION_PROBLEM is None and tensor.device.type == "cpu" and tensor.dtype in CPU_DTYPES
        return "cpu" if usable and op in _CPU_OPS else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in _UNAVAILABLE:
        others = "; ".join(f"{name}: {reason}" for name, reason in _UNAVAILABLE.items() if name != backend)
        raise RuntimeError(f"{op}: backend {backend!r} can't be used: {_UNAVAILABLE[backend]}; {others}")
    if tensor.device.type != backend:
        raise RuntimeError(f"{op}: backend {backend!r} needs {backend} tensors, got one on {tensor.device}")
    if tensor.dtype not in CPU_DTYPES:
        expected = ", ".join(str(dtype) for dtype in CPU_DTYPES)
        raise TypeError(f"{op}: backend {backend!r} expects dtype {expected}; got {tensor.dtype}")
    return backend
