"""Find nvcc and compile CUDA to PTX, for tests of kernels on machines without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path


class NvccNotFound(RuntimeError):
    """There is no nvcc on this machine."""


class NvccError(RuntimeError):
    """nvcc did not accept the source; the message is its own."""


def find_nvcc() -> Path:
    """The nvcc to use: `$NVCC`, the one on the path, or that of the wheel `nvidia-cuda-nvcc`.

    Raises:
        NvccNotFound: saying what to install.
    """
    named = os.environ.get("NVCC")
    if named:
        if not Path(named).is_file():
            raise NvccNotFound(f"NVCC={named} is not a file")
        return Path(named)
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    for base in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        wheel = Path(base) / "nvidia" / "cu13" / "bin" / "nvcc"
        if wheel.is_file():
            return wheel
    raise NvccNotFound(
        "nvcc is neither named by NVCC, nor on the path, nor in site-packages/nvidia/cu13/bin; "
        "pip install, each ==13.0.*: "
        "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl"
    )


def compile_ptx(source: str | Path, arch: str = "sm_80", options: Sequence[str] = ()) -> str:
    """PTX of CUDA source, given as text or as the path of a file.

    Raises:
        NvccNotFound: if there is no nvcc.
        NvccError: with the compiler's message.
    """
    nvcc = find_nvcc()
    with tempfile.TemporaryDirectory() as folder:
        path = source if isinstance(source, Path) else Path(folder) / "source.cu"
        if isinstance(source, str):
            path.write_text(source, encoding="utf-8")
        output = Path(folder) / "out.ptx"
        command = [str(nvcc), "-ptx", f"-arch={arch}", *options, str(path), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NvccError(f"{' '.join(command)}\n{done.stderr or done.stdout}")
        return output.read_text(encoding="utf-8")
