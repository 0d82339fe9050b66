"""compute-sanitizer's memcheck and racecheck on every kernel, at small sizes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_check.context import CannotRunError, Context

ROOT = Path(__file__).parents[3]
FOUND = 9  # the exit code that stands for an error found


def run(context: Context) -> None:
    tool = find_tool("compute-sanitizer")
    if context.small:
        raise CannotRunError("compute-sanitizer needs a GPU")
    wrong = []
    for kind in ("memcheck", "racecheck"):
        command = [
            *(tool, "--tool", kind, "--error-exitcode", str(FOUND), "--print-limit", "20"),
            *(
                sys.executable,
                "-m",
                "benchmarks.gpu_check.small_ops",
                "--device",
                "cuda",
                "--backend",
                "cuda",
            ),
        ]
        environment = os.environ | {
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"
        }  # so that bounds are a tensor's own
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr, flush=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        context.record(
            "sanitizer", name=kind, rc=done.returncode, right=done.returncode == 0, said=lines[-30:]
        )
        if done.returncode:
            wrong.append(kind)
    if wrong:
        raise RuntimeError(f"{', '.join(wrong)}: see log.txt")


def find_tool(name: str) -> str:
    """A tool of CUDA's, of the path or the toolkit's folder."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [shutil.which(name), *(f"{home}/bin/{name}" for home in homes if home)]
    found = next((place for place in places if place and Path(place).exists()), None)
    if found is None:
        raise CannotRunError(f"{name} is neither on the path nor in CUDA_HOME")
    return found
