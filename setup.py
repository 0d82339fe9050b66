"""Builds the one extension, `stream_r1_kernels/_C`: kernels registered with torch, no Python module.

It uses libtorch's stable ABI alone: built against any torch from TORCH_TARGET on, it runs with all of them.
`csrc/cpu/<op>.cpp` are compiled once; `csrc/cpu/<op>_kernel.cpp`, which need no torch, once for every
instruction set: the fastest that the machine has is picked at run time (csrc/cpu/isa.h). `csrc/cuda/<op>.cu`
are compiled by nvcc where build_support/cuda.py decides so, once for every architecture.

STREAM_R1_SANITIZE=1 adds AddressSanitizer and UBSan, and leaves out avx512 (see `make sanitize`).
"""

import json
import os
import platform
import runpy
import shutil
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent  # kernels/setup.py is a link to this file
sys.path.insert(0, str(ROOT))

from build_support import cuda  # noqa: E402
from build_support.objects import TORCH_TARGET, Job, against_torch, build  # noqa: E402

SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g1",
    "-O1",
]
SANITIZES = os.environ.get("STREAM_R1_SANITIZE") == "1"

ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
# Only products of matrices gain from products of bfloat16; the rest of such a machine's kernels are avx512's.
KERNEL_FILES = {"avx512_bf16": ("attention_*_kernel.cpp", "fused_linear_kernel.cpp")}

if SANITIZES:
    for isa in ("avx512", "avx512_bf16"):
        ISA_FLAGS.pop(isa, None)  # the same templates with more lanes, and half of a slow build

FLAGS = [
    *("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),
    *("-fvisibility=hidden", "-g0", f"-I{ROOT / 'csrc'}", *(SANITIZE if SANITIZES else [])),
    *(f"-DSTREAM_R1_HAS_{isa.upper()}" for isa in ISA_FLAGS),
]

CUDA, why_no_cuda = cuda.decide(torch.version.cuda)
LEFT_OUT = {} if CUDA else {"cuda": why_no_cuda}


class BringData(build_py):
    """Puts the small world and the recipes into the package, where `stream_r1.places` finds them."""

    def run(self) -> None:
        super().run()
        if "stream_r1" in self.packages and not self.editable_mode:  # the ops alone bring no data
            for name in ("assets", "recipes"):
                shutil.copytree(ROOT / name, Path(self.build_lib) / "stream_r1" / name, dirs_exist_ok=True)


class BuildKernels(build_ext):
    """Compiles the kernel files once an instruction set and records what was built beside the extension."""

    def run(self) -> None:
        target = ".".join(map(str, TORCH_TARGET))
        print(
            f"stream-r1: CPU kernels for {', '.join(ISA_FLAGS)}, for torch {target} and later, with "
            f"{torch.__version__}",
            file=sys.stderr,
        )
        if CUDA:
            print(f"stream-r1: CUDA kernels for {', '.join(cuda.archs())}, by {CUDA.nvcc}", file=sys.stderr)
        for part, why in LEFT_OUT.items():
            print(f"stream-r1: left out: {part} ({why})", file=sys.stderr)
        schemas = runpy.run_path(str(ROOT / "stream_r1_kernels/schemas.py"))
        record = {
            "torch": torch.__version__,
            "oldest_torch": target,
            "isa": list(ISA_FLAGS),
            "left_out": LEFT_OUT,
            "schemas": schemas["SCHEMAS"] + (schemas["GPU_SCHEMAS"] if CUDA else ()),
        }
        if CUDA:
            record["cuda_archs"] = cuda.archs()
        super().run()
        package = (ROOT if self.inplace else Path(self.build_lib)) / "stream_r1_kernels"
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        # Not where setuptools would put them: an editable install and a wheel share what is compiled.
        folder = ROOT / "build" / ("sanitized" if SANITIZES else "objects")
        compiler = [os.environ.get("CXX", "c++"), *FLAGS]
        wanted = []
        for isa, flags in ISA_FLAGS.items():
            for pattern in KERNEL_FILES.get(isa, ("*_kernel.cpp",)):
                for source in sorted((ROOT / "csrc/cpu").glob(pattern)):
                    wanted.append(_job([*compiler, *flags, f"-DSTREAM_R1_ISA={isa}"], source, folder / isa))
        bindings = [path for path in (ROOT / "csrc/cpu").glob("*.cpp") if not path.stem.endswith("_kernel")]
        bindings += cuda.binding_sources() if CUDA else []
        # -O1: checks and registration; the loops are in the kernels
        compiler += [*against_torch(), "-O1"]
        wanted += [_job(compiler, source, folder / "bindings") for source in sorted(bindings)]
        ext.extra_objects = build(wanted)
        if CUDA:
            ext.extra_objects += cuda.compile_kernels(CUDA, folder / "cuda")
            ext.extra_link_args += cuda.link_arguments(CUDA)
        self.force = True  # linking is quick
        super().build_extension(ext)


def _job(compiler: list[str], source: Path, folder: Path) -> Job:
    built = folder / f"{source.stem}.o"
    return Job(built, source, [*compiler, "-c", str(source), "-o", str(built)])


setup(
    ext_modules=[
        Extension(
            "stream_r1_kernels._C",
            sources=[],
            language="c++",
            library_dirs=[str(Path(torch.__file__).parent / "lib")],
            libraries=["torch_cpu"],
            extra_link_args=SANITIZE if SANITIZES else [],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BringData},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
