"""nvcc as the tests use it. What it makes is kept under build/, by the hash of sources and command."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from build_support import cuda
from build_support.objects import against_torch

CSRC = cuda.ROOT / "csrc"
CACHE = cuda.ROOT / "build/cuda_tests"


@cache
def toolkit() -> cuda.Toolkit:
    found = cuda.find_toolkit()
    if found is None:
        raise FileNotFoundError(
            "these tests compile the CUDA kernels and found no nvcc: install the development dependencies "
            "(nvidia-cuda-nvcc and what it needs, see pyproject.toml)"
        )
    return found


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _headers() -> dict[str, str]:
    """Every file that a kernel may include, by its path in csrc."""
    folders = ("common", "cuda", "cpu")
    return {
        str(path.relative_to(CSRC)): path.read_text()
        for folder in folders
        for path in sorted((CSRC / folder).glob("*.*"))
        if path.suffix in (".h", ".cuh")
    }


def _run(command: list[str], what: str) -> str:
    done = subprocess.run(
        command, env=toolkit().environment, capture_output=True, text=True, check=False, cwd=cuda.ROOT
    )
    if done.returncode != 0:
        raise RuntimeError(f"{what}: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _kernel_sources() -> dict[str, str]:
    return {f"cuda/{path.name}": path.read_text() for path in cuda.sources()}


def _all_in_one(folder: Path, files: list[Path]) -> Path:
    """One source file that includes `files`: headers are read once, which is most of the work."""
    unit = folder / f"all{files[0].suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    unit.write_text("".join(f'#include "{path.relative_to(CSRC)}"\n' for path in files))
    return unit


def compile_ptx(unit: str, patch: Mapping[str, tuple[str, str]], arch: str = "80") -> str:
    """The PTX of a source file for which the kernels' headers were changed: a fault was planted.

    Args:
        unit: text of the source file.
        patch: file of csrc -> (old text, new text). The old text must be there once.
        arch: compute capability, as nvcc has it.
    """
    files = _headers()
    for name, (old, new) in patch.items():
        if files[name].count(old) != 1:
            raise ValueError(f"{name} has {files[name].count(old)} places {old!r}, expected one")
        files[name] = files[name].replace(old, new)
    ptx = CACHE / _key(unit, *files, *files.values(), arch, str(toolkit().nvcc)) / "unit.ptx"
    if not ptx.exists():
        folder = ptx.parent / "csrc"
        for name, text in (files | {"unit.cu": unit}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        flags = [flag for flag in cuda.FLAGS if not flag.startswith("-I")]
        command = [str(toolkit().nvcc), *flags, f"-I{folder}", f"-arch=sm_{arch}", "-ptx"]
        command.append(str(folder / "unit.cu"))
        half_done = ptx.with_suffix(f".{os.getpid()}")
        _run([*command, "-o", str(half_done)], "a planted fault")
        half_done.rename(ptx)
        shutil.rmtree(folder)
    return ptx.read_text()


def compile_cubin(arch: str) -> tuple[Path, str]:
    """(the machine code of all kernels for `arch`, what ptxas says about them)."""
    key = _key(*_kernel_sources().values(), *_headers().values(), arch, str(toolkit().nvcc), *cuda.FLAGS)
    cubin = CACHE / key / f"kernels.{arch}.cubin"
    log = cubin.with_suffix(".log")
    if not log.exists():
        command = [str(toolkit().nvcc), *cuda.FLAGS, f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"]
        unit = _all_in_one(cubin.parent, cuda.sources())
        log.write_text(_run([*command, "-o", str(cubin), str(unit)], f"kernels for {arch}"))
    return cubin, log.read_text()


def build_host(runtime: Path) -> tuple[Path, str]:
    """The ops' host code (bindings and launch functions) with `runtime` in place of the CUDA runtime.

    Returns:
        The library, and the PTX (sm_80) of all kernels.
    """
    kernels = _key(*_kernel_sources().values(), *_headers().values(), str(toolkit().nvcc))
    folder = CACHE / kernels
    unit, object_file = _all_in_one(folder, cuda.sources()), folder / "all.o"
    if not object_file.exists():
        command = [str(toolkit().nvcc), *cuda.FLAGS, "-gencode=arch=compute_80,code=compute_80", "--keep"]
        command += ["--keep-dir", str(folder), "-c", str(unit), "-o", str(folder / "half.o")]
        _run(command, "kernels")
        (folder / "half.o").rename(object_file)

    headers = {name: text for name, text in _headers().items() if name.endswith(".h")}
    bindings = [path.read_text() for path in cuda.binding_sources()]
    folder = CACHE / _key(*bindings, *headers.values(), torch.__version__)
    binding_object = folder / "bindings.o"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-g0", "-fPIC", *against_torch()]
    if not binding_object.exists():
        unit = _all_in_one(folder, cuda.binding_sources())
        command = [*compiler, "-DSTREAM_R1_CUDA_KEY=PrivateUse1", f"-I{CSRC}"]
        _run([*command, "-c", str(unit), "-o", str(folder / "half.o")], "bindings")
        (folder / "half.o").rename(binding_object)

    library = CACHE / _key(str(object_file), str(binding_object), runtime.read_text()) / "libhost.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        half_done = library.with_suffix(f".{os.getpid()}")
        command = [*compiler, f"-I{toolkit().include}", "-shared", "-Wl,-Bsymbolic", "-o", str(half_done)]
        command += [str(runtime), str(object_file), str(binding_object)]
        _run([*command, f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"], "link")
        half_done.rename(library)
    return library, object_file.with_suffix(".ptx").read_text()
