"""`make gpu-check`: each step is a process of its own, so that the tests and timings load what was built.

Exit codes: 0 all done; 1 a step failed, and nothing is reported as measured; 3 there is no GPU to check.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
NO_GPU = 3
TESTS = ["tests/gpu", "tests/ops", "tests/cuda", "tests/models", "tests/sampling"]


def why_no_gpu() -> str | None:
    """Why there is nothing to check, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA: install a build of torch that has"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU"
    return None


def arch_of(capability: tuple[int, int]) -> str:
    """The architecture to compile for, as nvcc names it: with its own instructions where it has some."""
    major, minor = capability
    return f"{major}{minor}a" if (major, minor) in ((9, 0), (10, 0)) else f"{major}{minor}"


def steps(arch: str) -> list[tuple[str, list[str], dict[str, str]]]:
    """(what it does, command, environment) of every step."""
    build = {"STREAM_R1_CUDA": "1", "STREAM_R1_CUDA_ARCHS": os.environ.get("STREAM_R1_CUDA_ARCHS", arch)}
    python = sys.executable
    return [
        (f"build for sm_{arch}", [python, "setup.py", "-q", "build_ext", "--inplace"], build),
        ("what runs here", [python, "-m", "stream_r1_kernels.info"], {}),
        ("tests", [python, "-m", "pytest", "-q", *TESTS], {}),
        ("timings", [python, "-m", "benchmarks.gpu_check.measure", "docs/gpu-measured.md"], {}),
    ]


def main() -> int:
    problem = why_no_gpu()
    if problem is not None:
        print(f"gpu-check: {problem}.")
        print("gpu-check: nothing was built, tested or measured; docs/gpu.md says what is predicted.")
        return NO_GPU
    print(f"gpu-check: {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for name, command, environment in steps(arch_of(torch.cuda.get_device_capability())):
        print(f"gpu-check: {name}: {' '.join(command[1:])}", flush=True)
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False)
        if done.returncode:
            print(f"gpu-check: {name} failed with {done.returncode}; docs/gpu-measured.md is as it was.")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
