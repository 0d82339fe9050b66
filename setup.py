"""Builds the one extension, `stream_r1_kernels/_C`: ops registered with torch, no Python module.

`csrc/ops.cpp` and `csrc/cpu/<op>.cpp` are compiled once. `csrc/cpu/<op>_kernel.cpp` are compiled once for
every instruction set; the fastest that the machine has is picked at run time (csrc/cpu/isa.h).
`csrc/cuda/<op>.cu` are compiled by nvcc where build_support/cuda.py decides so, once for every architecture.
"""

import json
import os
import platform
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from build_support import cuda  # noqa: E402

GIGABYTES_PER_JOB = 1.5  # what one compiler process needs for torch's headers

ISA_FLAGS = {"baseline": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        *("-mprefer-vector-width=512", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ]

CUDA, why_no_cuda = cuda.decide(torch.version.cuda)
LEFT_OUT = {} if CUDA else {"cuda": why_no_cuda}


def jobs() -> int:
    """Compiler processes that fit the cores this process may use and the memory that is there."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return cores
    # MemAvailable, not MemFree: a page cache full of what pip has just unpacked is free for the taking
    sizes = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(sizes["MemAvailable"].split()[0]) / 2**20  # kB -> GB
    return max(1, min(cores, int(available / GIGABYTES_PER_JOB)))


class BuildKernels(BuildExtension):
    """Compiles the kernel files once an instruction set and records what was built beside the extension."""

    def run(self) -> None:
        print(
            f"stream-r1: CPU kernels for {', '.join(ISA_FLAGS)}, against torch {torch.__version__}",
            file=sys.stderr,
        )
        if CUDA:
            print(f"stream-r1: CUDA kernels for {', '.join(cuda.archs())}, by {CUDA.nvcc}", file=sys.stderr)
        for part, why in LEFT_OUT.items():
            print(f"stream-r1: left out: {part} ({why})", file=sys.stderr)
        record = {"torch": torch.__version__, "isa": list(ISA_FLAGS), "left_out": LEFT_OUT}
        if CUDA:
            record["cuda_archs"] = cuda.archs()
        package = (ROOT if self.inplace else Path(self.build_lib)) / "stream_r1_kernels"
        note, text = package / "_build.json", json.dumps(record, indent=2) + "\n"
        if not note.exists() or note.read_text() != text:
            self.force = True  # what was built before is of other parts
        super().run()
        note.write_text(text)

    def build_extension(self, ext: Extension) -> None:
        kernels = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*_kernel.cpp"))
        ext.extra_objects = [
            built
            for isa, flags in ISA_FLAGS.items()
            for built in self.compiler.compile(
                kernels,
                output_dir=os.path.join(self.build_temp, isa),
                include_dirs=ext.include_dirs,
                macros=ext.define_macros,
                extra_postargs=[*ext.extra_compile_args["cxx"], *flags, f"-DSTREAM_R1_ISA={isa}"],
            )
        ]
        if CUDA:
            ext.extra_objects += cuda.compile_kernels(CUDA, Path(self.build_temp) / "cuda", jobs())
            ext.extra_link_args += cuda.link_arguments(CUDA)
        ext.extra_compile_args["cxx"] += ["-include", self.precompile_torch_headers(ext)]
        super().build_extension(ext)

    def precompile_torch_headers(self, ext: Extension) -> str:
        """Compile csrc/cpu/torch_headers.h with the ops' flags; the compiler finds the result beside the
        path returned.

        A compiler that can't use it reads the header itself: slower, not different.
        """
        header = Path(self.build_temp).resolve() / "torch_headers.h"
        compiled = header.with_suffix(".h.gch")
        source = ROOT / "csrc/cpu/torch_headers.h"
        if not compiled.exists() or compiled.stat().st_mtime < source.stat().st_mtime:
            header.parent.mkdir(parents=True, exist_ok=True)
            header.write_text(source.read_text())
            includes = [f"-I{path}" for path in (*ext.include_dirs, *self.compiler.include_dirs)]
            defines = [f"-D{name}={value}" for name, value in ext.define_macros]
            flags = [*self.compiler.compiler_so[1:], *defines, *includes, *ext.extra_compile_args["cxx"]]
            compiler = os.environ.get("CXX", "c++")
            self.spawn([compiler, *flags, "-x", "c++-header", str(header), "-o", str(compiled)])
        return str(header)


def extension() -> CppExtension:
    sources = [path for path in (ROOT / "csrc/cpu").glob("*.cpp") if not path.stem.endswith("_kernel")]
    sources += cuda.binding_sources() if CUDA else []
    return CppExtension(
        "stream_r1_kernels._C",
        sorted(str(path.relative_to(ROOT)) for path in [ROOT / "csrc/ops.cpp", *sources]),
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")),
        define_macros=[(f"STREAM_R1_HAS_{isa.upper()}", "1") for isa in ISA_FLAGS],
        extra_compile_args={
            "cxx": [
                *("-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
                *("-fvisibility=hidden", "-g0", "-Winvalid-pch"),
            ]
        },
        py_limited_api=True,
    )


os.environ.setdefault("MAX_JOBS", str(jobs()))
setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildKernels.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
