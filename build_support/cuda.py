"""Compiling the CUDA kernels: where nvcc is, for which GPUs, with which flags, and whether to.

The kernels (csrc/cuda/*.cu) need nvcc alone: no torch headers, no GPU. nvcc is taken from CUDA_HOME, the
path, or the wheels that NVIDIA puts on PyPI (nvidia-cuda-nvcc and what it needs).

Environment:
    STREAM_R1_CUDA        1: build the CUDA kernels, or fail; 0: leave them out. Unset: build them where
                          there is nvcc, and a GPU or a torch with CUDA.
    STREAM_R1_CUDA_ARCHS  compute capabilities, such as "80;90a"; the last one is kept as PTX too.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from .objects import ROOT, Job, build

DEFAULT_ARCHS = "80;90a;100a;120"
FLAGS = ("-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xcompiler", "-fPIC,-fvisibility=hidden")


def sources() -> list[Path]:
    """The files that nvcc compiles."""
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def binding_sources() -> list[Path]:
    """The files that the C++ compiler compiles, with torch's headers."""
    return sorted((ROOT / "csrc/cuda").glob("*.cpp"))


def _wheels() -> list[Path]:
    """Folders where NVIDIA's wheels put the toolkit."""
    packages = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *site.getsitepackages()}
    return [path for folder in sorted(packages) if (path := Path(folder) / "nvidia/cu13").is_dir()]


@dataclass(frozen=True)
class Toolkit:
    """nvcc, and the folder of its `include` and `lib`."""

    nvcc: Path
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """For running nvcc: the tools it calls lie beside it."""
        return {**os.environ, "PATH": f"{self.nvcc.parent}{os.pathsep}{os.environ.get('PATH', '')}"}

    @property
    def include(self) -> Path:
        return self.home / "include"

    def static_runtime(self) -> Path | None:
        """libcudart_static.a, or None."""
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (path := self.home / folder / "libcudart_static.a").exists():
                return path
        return None


def find_toolkit() -> Toolkit | None:
    """The first nvcc of CUDA_HOME, the path and PyPI's wheels."""
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    on_path = shutil.which("nvcc")
    if on_path:
        # The nvcc on the path may be a script that starts the one of a toolkit.
        script = Path(on_path).resolve()
        inner = (
            re.search(rb"(/\S+)/bin/nvcc\b", script.read_bytes()[:4096])
            if script.stat().st_size < 4096
            else None
        )
        homes.append(Path(inner[1].decode()) if inner else script.parent.parent)
    homes += _wheels()
    for home in homes:
        if (nvcc := home / "bin/nvcc").exists():
            return Toolkit(nvcc, home)
    return None


def archs() -> list[str]:
    """Compute capabilities to compile for, such as ["80", "90a"].

    Raises:
        ValueError: STREAM_R1_CUDA_ARCHS is not a list of capabilities.
    """
    given = os.environ.get("STREAM_R1_CUDA_ARCHS", DEFAULT_ARCHS)
    found = [arch for arch in re.split(r"[;,\s]+", given) if arch]
    wrong = [arch for arch in found if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong or not found:
        raise ValueError(
            f'STREAM_R1_CUDA_ARCHS: expected capabilities such as "{DEFAULT_ARCHS}", got {given!r}'
        )
    return found


def arch_flags(capabilities: list[str]) -> list[str]:
    """nvcc's flags: machine code for every capability, PTX of the last for GPUs to come."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in capabilities]
    return [*flags, f"-gencode=arch=compute_{capabilities[-1]},code=compute_{capabilities[-1]}"]


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def decide(torch_cuda: str | None) -> tuple[Toolkit | None, str]:
    """(toolkit to build with, "") or (None, why the CUDA kernels are left out).

    Args:
        torch_cuda: the CUDA version that torch was built with, or None.

    Raises:
        RuntimeError: STREAM_R1_CUDA=1, but nvcc or its static runtime is missing.
    """
    wish = os.environ.get("STREAM_R1_CUDA", "")
    if wish not in ("", "0", "1"):
        raise RuntimeError(f"STREAM_R1_CUDA: expected 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "STREAM_R1_CUDA=0"
    toolkit = find_toolkit()
    if toolkit is None or toolkit.static_runtime() is None:
        missing = (
            "nvcc was not found in CUDA_HOME, on the path or among the wheels of PyPI (nvidia-cuda-nvcc)"
            if toolkit is None
            else f"{toolkit.home} has no libcudart_static.a (nvidia-cuda-runtime)"
        )
        if wish == "1":
            raise RuntimeError(f"STREAM_R1_CUDA=1, but {missing}")
        return None, missing
    if wish == "" and torch_cuda is None and not _has_gpu():
        return (
            None,
            "there is no GPU here and torch has no CUDA; STREAM_R1_CUDA=1 builds the kernels all the same",
        )
    return toolkit, ""


def compile_kernels(toolkit: Toolkit, folder: Path) -> list[str]:
    """Object files of all kernels, in `folder`.

    Raises:
        subprocess.CalledProcessError: nvcc refused a file; what it said has been printed.
    """

    def job(source: Path) -> Job:
        built = folder / f"{source.stem}.o"
        compiler = [str(toolkit.nvcc), *FLAGS, *arch_flags(archs())]
        return Job(built, source, [*compiler, "-c", str(source), "-o", str(built)])

    return build([job(source) for source in sources()], toolkit.environment)


def link_arguments(toolkit: Toolkit) -> list[str]:
    """The CUDA runtime, inside the extension and invisible outside it: torch brings its own."""
    return [
        str(toolkit.static_runtime()),
        "-Wl,--exclude-libs,libcudart_static.a",
        "-ldl",
        "-lrt",
        "-lpthread",
    ]
