"""`python -m stream_r1_kernels.info`: what is built, against what, what runs here, and what does not and
why."""

from __future__ import annotations

import platform
import sys

import torch

from .backends import EXTENSION_PROBLEM, read_build_record, unavailable


def describe() -> str:
    """The report as text."""
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
    why = unavailable()
    for name in ("cpu", "cuda", "triton", "reference"):
        lines.append(f"backend {name:<10}{'no: ' + why[name] if name in why else 'yes'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(describe() + "\n")
