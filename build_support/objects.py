"""Compiling source files side by side, and keeping object files whose sources and command are the same."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCH_TARGET = (2, 10)  # the oldest torch that the extension runs with
_GIGABYTES_PER_JOB = 0.7  # what one compiler process may need


@dataclass(frozen=True)
class Job:
    """An object file, its source, and the command that makes it."""

    built: Path
    source: Path
    command: Sequence[str]


def against_torch() -> list[str]:
    """The compiler's flags for libtorch's stable ABI, as it is in every torch from TORCH_TARGET on."""
    import torch  # kernels and their tools compile without

    target = "0x{:02x}{:02x}000000000000".format(*TORCH_TARGET)
    return [f"-DTORCH_TARGET_VERSION={target}", "-isystem", str(Path(torch.__file__).parent / "include")]


def jobs() -> int:
    """Compiler processes that fit the cores this process may use and the memory that is there; MAX_JOBS."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return cores
    # MemAvailable, not MemFree: a page cache full of what pip has just unpacked is free for the taking
    sizes = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(sizes["MemAvailable"].split()[0]) / 2**20  # kB -> GB
    return max(1, min(cores, int(available / _GIGABYTES_PER_JOB)))


def build(wanted: Sequence[Job], environment: Mapping[str, str] | None = None) -> list[str]:
    """The object files, in order; what is newer than all that it includes and was made alike is kept.

    Raises:
        subprocess.CalledProcessError: the compiler refused a file; what it said has been printed.
    """

    def run(job: Job) -> str:
        note, text = job.built.with_suffix(".command"), " ".join(job.command)
        if not (_is_newer_than_sources(job) and note.exists() and note.read_text() == text):
            job.built.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([*job.command, "-MMD", "-MF", _includes(job)], check=True, env=environment)
            note.write_text(text)
        return str(job.built)

    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(run, wanted))


def _includes(job: Job) -> str:
    """The file in which the compiler lists what a source includes."""
    return str(job.built.with_suffix(".d"))


def _is_newer_than_sources(job: Job) -> bool:
    listed = Path(_includes(job))
    if not (job.built.exists() and listed.exists()):
        return False
    sources = listed.read_text().split(":", 1)[1].replace("\\\n", " ").split()
    made = job.built.stat().st_mtime
    return all(Path(source).exists() and Path(source).stat().st_mtime < made for source in sources)
