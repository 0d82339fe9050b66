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
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the compiled kernels
TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)
TENSOR_CORE_OPS = ("cached_chunk_attention", "chunk_attention")  # on CUDA

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


def covers(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether kernels compiled for `archs` (the last one kept as PTX too) run on a GPU of this capability.

    "80" runs on 8.0 and later 8.x; "90a" on 9.0 alone; "100f" on the 10.x from 10.0 on. PTX without a suffix
    runs on every later GPU.
    """
    for arch in archs:
        parsed = re.fullmatch(r"(\d+)(\d)([af]?)", arch)
        if parsed is None:
            continue
        built = (int(parsed[1]), int(parsed[2]))
        if capability == built:
            return True
        if parsed[3] != "a" and capability[0] == built[0] and capability[1] >= built[1]:
            return True
        if parsed[3] == "" and arch == archs[-1] and capability >= built:
            return True
    return False


def _find_unavailable() -> dict[str, str]:
    why = {"triton": "this version has no Triton kernels yet"}
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


# Looked up once: asking the dispatcher takes longer than a small op, and a compiled graph can't ask.
def _ops_of(key: str) -> frozenset[str]:
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return frozenset(name.removeprefix("stream_r1::") for name in names if name.startswith("stream_r1::"))


_OPS = {"cpu": _ops_of("CPU"), "cuda": _ops_of("CUDA")}


def unavailable() -> dict[str, str]:
    """Why a backend can't be used here, by name; backends that are not in it can be."""
    why = dict(_UNAVAILABLE)
    if "cuda" not in why:
        if not torch.cuda.is_available():
            why["cuda"] = "torch finds no GPU"
        elif (problem := _device_problem(torch.device("cuda", torch.cuda.current_device()))) is not None:
            why["cuda"] = problem
    return why


def _device_problem(device: torch.device) -> str | None:
    """Why the compiled kernels can't run on a GPU, or None. A graph being traced can't ask."""
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if covers(_CUDA_ARCHS, capability):
        return None
    gpu, (major, minor) = torch.cuda.get_device_name(device), capability
    return (
        f"the kernels were compiled for {', '.join(_CUDA_ARCHS)}, and {gpu} has compute capability "
        f"{major}.{minor}: build with STREAM_R1_CUDA_ARCHS={major}{minor}"
    )


def _refusal(op: str, tensor: Tensor) -> tuple[type[Exception], str] | None:
    """Why the compiled kernels of the tensor's device don't take it, or None."""
    backend = tensor.device.type
    on_tensor_cores = backend == "cuda" and op in TENSOR_CORE_OPS
    dtypes = TENSOR_CORE_DTYPES if on_tensor_cores else DTYPES
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        return TypeError, f"{op}: backend {backend!r} expects dtype {expected}; got {tensor.dtype}"
    if on_tensor_cores and tensor.shape[-1] > 128:
        got = tensor.shape[-1]
        return ValueError, f"{op}: backend 'cuda' expects heads of at most 128 channels; got {got}"
    if backend == "cuda" and (problem := _device_problem(tensor.device)) is not None:
        return RuntimeError, f"{op}: backend 'cuda' can't be used: {problem}"
    return None


def resolve(backend: str, op: str, tensor: Tensor) -> str:
    """The backend that `op` runs on: "cpu", "cuda" or "reference".

    "auto" takes the compiled kernels of the tensor's device where there are some that take the tensor, and
    the reference for everything else. A backend that is named is used or refused, never replaced.

    Raises:
        ValueError: the name is unknown, or the backend has no kernels for the tensor's size.
        RuntimeError: the backend can't be used on this machine, or not on the tensor's device.
        TypeError: the backend has no kernels for the tensor's dtype.
    """
    if backend == "reference":
        return backend
    device = tensor.device.type
    if backend == "auto":
        has_kernels = device not in _UNAVAILABLE and op in _OPS.get(device, ())
        return device if has_kernels and _refusal(op, tensor) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in _UNAVAILABLE:
        others = "; ".join(f"{name}: {reason}" for name, reason in _UNAVAILABLE.items() if name != backend)
        raise RuntimeError(f"{op}: backend {backend!r} can't be used: {_UNAVAILABLE[backend]}; {others}")
    if device != backend:
        raise RuntimeError(f"{op}: backend {backend!r} needs {backend} tensors, got one on {tensor.device}")
    if (refusal := _refusal(op, tensor)) is not None:
        kind, message = refusal
        raise kind(message)
    return backend
