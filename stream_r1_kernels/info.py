"""`python -m stream_r1_kernels.info`: what is built, against what, what runs here, and what does not and
why."""

from __future__ import annotations

import platform
import sys

import torch

from .backends import EXTENSION_PROBLEM, build, read_build_record, unavailable
from .dispatch import ATTENTION_OPS, BACKENDS, OPS, Build, Call, Choice, choose

_GPUS = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
_SITUATIONS = ("one piece", "two pieces", "with grad", "float32", "other ops")


def describe() -> str:
    """The report as text."""
    return "\n".join([*_what_is_built(), "", *_ops_table(), "", *auto_table(build())])


def _what_is_built() -> list[str]:
    record = read_build_record()
    lines = [
        f"torch running     {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    ]
    if record is None:
        lines.append("extension         not built")
    else:
        lines.append(f"extension built   against torch {record['torch']}")
        lines.append(f"  CPU kernels     {', '.join(record['isa'])}")
        if "cuda_archs" in record:
            lines.append(f"  CUDA kernels    {', '.join(record['cuda_archs'])}, PTX of the last")
        lines.extend(f"  left out        {part}: {why}" for part, why in record["left_out"].items())
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
                there = op != "renew_sink_" or name == "cuda"
            row.append("-" if not there else "no" if name in why else "yes")
        rows.append(row)
    return [*_aligned(rows), *(f"not {name}: {reason}" for name, reason in why.items())]


def auto_table(have: Build) -> list[str]:
    """What backend="auto" takes on this processor and, with this build, on GPUs; and the reasons.

    Attention in bfloat16 with keys in one piece of memory or two, with grad, and in float32; and the other
    ops.
    """
    rows, whys = [["auto takes", *_SITUATIONS]], dict[str, None]()
    devices: list[tuple[str, str, tuple[int, int] | None]] = [("cpu", "cpu", None)]
    devices += [(f"GPU {major}.{minor}", "cuda", (major, minor)) for major, minor in _GPUS]
    for name, device, capability in devices:
        choices = [choose(call, have) for call in _calls(device, capability)]
        rows.append([name, *(choice.backend for choice in choices)])
        whys |= {_reason(choice): None for choice in choices}
    legend = (
        "(attention in bfloat16: keys in one piece of memory, in two, with grad; in float32; the other ops)"
    )
    return [*_aligned(rows), legend, *whys]


def _calls(device: str, capability: tuple[int, int] | None) -> list[Call]:
    half, head_dim, (cached, _) = torch.bfloat16, 128, ATTENTION_OPS
    return [
        Call(cached, device, half, head_dim, capability),
        Call(cached, device, half, head_dim, capability, pieces=2),
        Call(cached, device, half, head_dim, capability, needs_grad=True, pieces=2),
        Call(cached, device, torch.float32, head_dim, capability),
        Call("gated_add", device, half, None, capability),
    ]


def _reason(choice: Choice) -> str:
    return f"{choice.backend}: {choice.why}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(24 if i == 0 else 0, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.stdout.write(describe() + "\n")
