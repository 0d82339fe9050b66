"""Which backend runs an op: a pure function of the call and of what is built, the same with or without a GPU.

`refusal` says why a backend can't take a call, or nothing; `choose` takes the first of an order of preference
that does not refuse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

BACKENDS = ("auto", "cpu", "cuda", "triton", "sdpa", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the compiled kernels and of SDPA
TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)
ATTENTION_OPS = ("cached_chunk_attention", "chunk_attention")
TRITON_OPS = frozenset(ATTENTION_OPS)
CPU_ALONE = ("fused_linear",)  # compiled for CPUs and no GPU
FP8_OPS = ("quantize_rows", "modulated_norm_fp8")  # for GPUs alone
FORWARD_ONLY = (*CPU_ALONE, "rms_norm", *FP8_OPS)  # compiled without a backward
OPS = (
    *ATTENTION_OPS,
    *("renew_sink_", "qk_norm_rotary", "modulated_norm", "gated_add", "rms_norm_silu"),
    *("region_saliency", "intra_weights", "dmd_loss", "dmd_gradient_"),
    *FORWARD_ONLY,
)
WIDEST_HEAD = 128  # of the attention kernels on GPUs
HOPPER_CUDNN = 91501  # the first cuDNN whose attention leads on sm_90, as `torch.backends.cudnn.version()`

Refusal = tuple[type[Exception], str]


@dataclass(frozen=True)
class Call:
    """What a backend is picked by.

    Attributes:
        device: "cpu", "cuda", ...
        capability: of the GPU; None: not a GPU, or one that can't be asked.
        head_dim: channels of a head, of an attention op.
        needs_grad: whether autograd records the call.
        pieces: of memory that the keys lie in. [past | fresh] are two; a cache's visible prefix is one.
        dense: whether the last dimension of every input is contiguous.
    """

    op: str
    device: str
    dtype: torch.dtype
    head_dim: int | None = None
    capability: tuple[int, int] | None = None
    needs_grad: bool = False
    pieces: int = 1
    dense: bool = True


@dataclass(frozen=True)
class Build:
    """What there is to pick from.

    Attributes:
        ops: with kernels, by backend ("cpu", "cuda", "triton").
        archs: that the CUDA kernels were compiled for, the last one as PTX too.
        missing: backends that can't be used here at all, and why.
        cudnn: version of what torch's attention may run on, 91501 for 9.15.1; None: there is none.
    """

    ops: Mapping[str, frozenset[str]]
    archs: Sequence[str] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    cudnn: int | None = None


@dataclass(frozen=True)
class Choice:
    """The backend that "auto" takes, why, and why not those that it would rather have had."""

    backend: str
    why: str
    refused: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.why}"]
        lines += [f"  not {backend}: {why}" for backend, why in self.refused.items()]
        return "\n".join(lines)


def covers(archs: Sequence[str], capability: tuple[int, int]) -> bool:
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


def arch_problem(archs: Sequence[str], capability: tuple[int, int], gpu: str = "this GPU") -> str | None:
    """Why kernels compiled for `archs` can't run on a GPU, or None."""
    if covers(archs, capability):
        return None
    major, minor = capability
    return (
        f"the kernels were compiled for {', '.join(archs)}, and {gpu} has compute capability "
        f"{major}.{minor}: build with STREAM_R1_CUDA_ARCHS={major}{minor}"
    )


def refusal(backend: str, call: Call, build: Build) -> Refusal | None:
    """Why a backend other than "auto" can't take a call: a kind of error, and what follows the backend's name
    in its message. None: it can.
    """
    if backend == "reference":
        return None
    if backend in build.missing:
        return RuntimeError, f"can't be used: {build.missing[backend]}"
    if backend == "sdpa":
        return _sdpa_refusal(call)
    device = "cuda" if backend == "triton" else backend
    if call.device != device:
        return RuntimeError, f"needs {device} tensors, got one on {call.device}"
    if call.op not in build.ops.get(backend, ()):
        return RuntimeError, f"has no kernel of {call.op}"
    if call.op in FORWARD_ONLY and call.needs_grad:
        return ValueError, f"has no backward of {call.op}: use it under torch.no_grad()"
    on_tensor_cores = device == "cuda" and call.op in ATTENTION_OPS
    if (dtype := _dtype_refusal(call, TENSOR_CORE_DTYPES if on_tensor_cores else DTYPES)) is not None:
        return dtype
    if on_tensor_cores and call.head_dim is not None and call.head_dim > WIDEST_HEAD:
        return ValueError, f"expects heads of at most {WIDEST_HEAD} channels; got {call.head_dim}"
    if call.capability is None:
        return None
    if backend == "cuda" and (problem := arch_problem(build.archs, call.capability)) is not None:
        return RuntimeError, f"can't be used: {problem}"
    if backend == "triton" and call.capability < (8, 0):
        return RuntimeError, "needs compute capability 8.0 or later, got " + ".".join(
            map(str, call.capability)
        )
    return None


def _sdpa_refusal(call: Call) -> Refusal | None:
    if call.op not in ATTENTION_OPS:
        return RuntimeError, f"stands in for {', '.join(ATTENTION_OPS)} alone"
    if call.device not in ("cpu", "cuda"):
        return RuntimeError, f"needs cpu or cuda tensors, got one on {call.device}"
    return _dtype_refusal(call, DTYPES)


def _dtype_refusal(call: Call, dtypes: Sequence[torch.dtype]) -> Refusal | None:
    if call.dtype in dtypes:
        return None
    return TypeError, f"expects dtype {', '.join(map(str, dtypes))}; got {call.dtype}"


def _preferences(call: Call, cudnn: int | None) -> list[tuple[str, str]]:
    """(backend, why it is preferred to what follows), best first, for the call's device."""
    reference = ("reference", "nothing faster takes the call")
    if call.device not in ("cpu", "cuda"):
        return [reference]
    cpu, cuda = ("cpu", "compiled for this processor"), ("cuda", "compiled for this GPU")
    stand_in = ("sdpa", "no kernel of this package takes the call")
    if call.op not in ATTENTION_OPS:
        return [cpu if call.device == "cpu" else cuda, reference]
    if call.device == "cpu":
        return [cpu, stand_in, reference]
    # keys in one piece of memory and no mask: torch's attention reads them where they lie
    whole = call.op == "cached_chunk_attention" and call.pieces == 1 and call.dense
    if call.needs_grad:
        # Not "cuda": its backward is matrix products in float32, slice by slice.
        triton = ("triton", "its backward is a kernel too")
        if whole and call.capability == (9, 0) and cudnn is not None and cudnn >= HOPPER_CUDNN:
            likely = "cuDNN's attention is likely the fastest on sm_90 from 9.15.1 on, for keys in one piece"
            return [("sdpa", f"{likely}; a prediction, not a measurement"), triton, reference]
        return [triton, ("sdpa", "its backward is a kernel, ours on GPUs are Triton's alone"), reference]
    if call.capability is None or call.capability < (9, 0):
        triton = ("triton", "compiled for this GPU when first called")
        return [cuda, triton, stand_in, reference]
    triton = ("triton", "from sm_90 on its compiler uses tensor cores that mma.sync does not reach")
    if whole:
        likely = (
            "torch's own dense attention is likely the faster one on sm_90 and later, for keys in one piece "
            "without grad; a prediction, not a measurement"
        )
        return [("sdpa", likely), triton, cuda, reference]
    return [triton, cuda, stand_in, reference]


def choose(call: Call, build: Build) -> Choice:
    """The backend of `backend="auto"`."""
    refused: dict[str, str] = {}
    for backend, why in _preferences(call, build.cudnn):
        problem = refusal(backend, call, build)
        if problem is None:
            return Choice(backend, why, refused)
        refused[backend] = problem[1]
    raise AssertionError("the reference takes every call")
