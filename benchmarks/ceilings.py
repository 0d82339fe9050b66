"""What this machine can do at most, by loops that do nothing else; and torch's own matmul beside it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

SOURCE = Path(__file__).with_name("ceilings.cpp")
FOOTPRINTS = tuple(2**power for power in range(15, 29, 2))  # bytes: 32 KiB, in a core's own cache, to 128 MiB
SIDE = 1536  # of the matrices


@dataclass(frozen=True)
class Ceilings:
    """Of one machine with torch's number of threads.

    flops: a second, by dtype: fused multiply-adds in float32, which float16 is computed in too; for bfloat16
        the fastest of those, its dot products and AMX tiles.
    memory: bytes a second by bytes in use, read or copied, whichever is faster; it falls as they grow.
    matmul: flops a second of torch's own matmul, by dtype: no limit, but what the baselines are built on.
    """

    flops: dict[str, float] = field(default_factory=dict)
    memory: dict[int, float] = field(default_factory=dict)
    matmul: dict[str, float] = field(default_factory=dict)

    def seconds(self, dtype: str, flops: float, moved: float) -> dict[str, float]:
        """The least time for so many flops, and for so many bytes moved, by what limits: "flops", "bytes"."""
        least = {}
        if flops and dtype in self.flops:
            least["flops"] = flops / self.flops[dtype]
        if moved and self.memory:
            within = [size for size in self.memory if size <= moved] or [min(self.memory)]
            least["bytes"] = moved / self.memory[max(within)]
        return least


def measure(threads: int | None = None) -> Ceilings:
    """Some ten seconds.

    Args:
        threads: torch's, if None.

    Raises:
        RuntimeError: no C++ compiler, or one that can't compile the loops.
    """
    threads = threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        loops = _compiled(Path(folder))
        fma = loops.fma_rate(threads)
        bfloat16 = max(fma, loops.bf16_dot_rate(threads), loops.amx_rate(threads))
        memory: dict[int, float] = {}
        best = 0.0
        for size in reversed(FOOTPRINTS):  # what is reached with more in use is reached with less
            best = max(best, loops.read_rate(threads, size), loops.copy_rate(threads, size))
            memory[size] = best
    return Ceilings({"float32": fma, "float16": fma, "bfloat16": bfloat16}, memory, _matmuls())


def _compiled(folder: Path) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError(
            "ceilings: expected a C++ compiler, c++ or $CXX, to measure the machine's limits; got none"
        )
    library = folder / "ceilings.so"
    options = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"]
    done = subprocess.run(
        [*compiler.split(), *options, str(SOURCE), "-o", str(library)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"ceilings: {compiler} could not compile {SOURCE.name}:\n{done.stderr}")
    loops = ctypes.CDLL(str(library))
    for name in ("fma_rate", "bf16_dot_rate", "amx_rate"):
        function = getattr(loops, name)
        function.argtypes, function.restype = [ctypes.c_int], ctypes.c_double
    for name in ("read_rate", "copy_rate"):
        function = getattr(loops, name)
        function.argtypes, function.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_double
    return loops


def _matmuls() -> dict[str, float]:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in "ab")
        out = torch.empty_like(a)
        seconds = _median_seconds(lambda out=out, a=a, b=b: torch.mm(a, b, out=out))  # type: ignore[misc]
        found[str(dtype).removeprefix("torch.")] = 2 * SIDE**3 / seconds
    return found


def _median_seconds(run: Callable[[], object], at_least: int = 7, budget: float = 1.0) -> float:
    run()
    times: list[float] = []
    while len(times) < at_least or (sum(times) < budget and len(times) < 50):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)
