"""`python -m stream_r1_kernels.info`: what is built, against what, what runs here, and what does not and
why."""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from importlib.metadata import packages_distributions

import torch
from torch.nn.attention import SDPBackend

from .backends import EXTENSION_PROBLEM, build, read_build_record, unavailable
from .dispatch import ATTENTION_OPS, BACKENDS, CPU_ALONE, FP8_OPS, OPS, Build, Call, choose

_GPUS = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
_ATTENTION = Call(ATTENTION_OPS[0], "cpu", torch.bfloat16, head_dim=128)
_SITUATIONS = {
    "one piece": _ATTENTION,  # of memory that the keys lie in
    "two pieces": replace(_ATTENTION, pieces=2),
    "strided": replace(_ATTENTION, dense=False),
    "with grad": replace(_ATTENTION, pieces=2, needs_grad=True),
    "one piece, grad": replace(_ATTENTION, needs_grad=True),
    "float32": replace(_ATTENTION, dtype=torch.float32),
    "float64": replace(_ATTENTION, dtype=torch.float64),
    "heads of 256": replace(_ATTENTION, head_dim=256),
    "other ops": Call("gated_add", "cpu", torch.bfloat16),
}

_NEVER = {"cpu": ("renew_sink_", *FP8_OPS), "cuda": CPU_ALONE}  # what a backend has no kernel of


def describe() -> str:
    """The report as text."""
    return "\n".join([*_what_is_built(), *torch_attention(), "", *_ops_table(), "", *auto_table(build())])


def torch_attention() -> list[str]:
    """Whose kernel torch's attention, the backend "sdpa", runs on each device of this machine: by torch's own
    choice for bfloat16, heads of 128 and no mask, without gradients and with them.
    """
    version = build().cudnn
    told = (
        "no cuDNN" if version is None else f"cuDNN {version // 10000}.{version // 100 % 100}.{version % 100}"
    )
    lines = []
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        chosen = []
        for grad in (False, True):
            q = torch.zeros(1, 2, 128, 128, dtype=torch.bfloat16, device=device, requires_grad=grad)
            chosen.append(SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower())
        lines.append(f"torch's attention {device}: {chosen[0]}, with grad {chosen[1]} ({told})")
    return lines


def _what_is_built() -> list[str]:
    record = read_build_record()
    lines = [
        f"torch running     {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    ]
    if record is None:
        lines.append("extension         not built")
    else:
        oldest = record.get("oldest_torch")
        lines.append(f"extension built   for torch {oldest} and later, with torch {record['torch']}")
        lines.append(f"  CPU kernels     {', '.join(record['isa'])}")
        if "cuda_archs" in record:
            lines.append(f"  CUDA kernels    {', '.join(record['cuda_archs'])}, PTX of the last")
        lines.extend(f"  left out        {part}: {why}" for part, why in record["left_out"].items())
    installed = sorted({*packages_distributions().get("stream_r1_kernels", [])})
    if len(installed) > 1:
        lines.append(f"installed twice   by {' and '.join(installed)}: uninstall both, then install one")
    if EXTENSION_PROBLEM is None:
        lines.append(f"running with      {torch.ops.stream_r1.cpu_isa()}, {torch.get_num_threads()} threads")
    return lines


def _ops_table() -> list[str]:
    """Op by backend: yes, no (why is said below), or - where there never is a kernel."""
    why, have = unavailable(), build()
    names = [name for name in BACKENDS if name != "auto"]
    rows = [["op", *names]]
    for op in OPS:
        row = [op]
        for name in names:
            kernels = {"sdpa": ATTENTION_OPS, "reference": OPS, "triton": ATTENTION_OPS}.get(name)
            there = op in have.ops.get(name, ()) if kernels is None else op in kernels
            if kernels is None and name in why:  # not loaded: what it would have
                there = op not in _NEVER[name]
            row.append("-" if not there else "no" if name in why else "yes")
        rows.append(row)
    return [*_aligned(rows), *(f"not {name}: {reason}" for name, reason in why.items())]


def auto_table(have: Build) -> list[str]:
    """What backend="auto" takes on this processor and, with this build, on GPUs; why, and why not another.

    Attention is that of a cache, in bfloat16 with heads of 128 channels, but for what a column says.
    """
    rows = [["auto takes", *_SITUATIONS]]
    why, why_not = dict[str, None](), dict[tuple[str, str], dict[str, None]]()
    devices: list[tuple[str, str, tuple[int, int] | None]] = [("cpu", "cpu", None)]
    devices += [(f"GPU {major}.{minor}", "cuda", (major, minor)) for major, minor in _GPUS]
    for name, device, capability in devices:
        choices = [
            choose(replace(call, device=device, capability=capability), have) for call in _SITUATIONS.values()
        ]
        rows.append([name, *(choice.backend for choice in choices)])
        for choice in choices:
            why[f"{choice.backend}: {choice.why}"] = None
            for backend, reason in choice.refused.items():
                why_not.setdefault((backend, reason), {})[name] = None
    refused = [f"not {backend} ({', '.join(where)}): {why}" for (backend, why), where in why_not.items()]
    legend = "(attention in bfloat16, heads of 128, keys in one piece of memory, but for what a column says)"
    return [*_aligned(rows), legend, "", *why, *refused]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(24 if i == 0 else 0, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.stdout.write(describe() + "\n")
