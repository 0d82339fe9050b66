"""`python -m benchmarks.gpu_check`: everything that this machine's GPU can tell, within a budget.

Needs torch; takes what else is there. Results are in DIR/results.jsonl as they come, DIR/summary.md after
every stage, what was printed in DIR/log.txt. A run in the same DIR adds to it.

Exit codes: 0 every stage ended well; 1 some did not; 2 bad arguments; 3 there is no GPU, and each stage said
so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from benchmarks.gpu_check import records
from benchmarks.gpu_check.plan import BUDGET, NAMES, STAGES
from benchmarks.gpu_check.runner import ROOT, Runner

NO_GPU = 3


def arch_of(capability: tuple[int, int]) -> str:
    """The architecture to compile for, as nvcc names it: with its own instructions where it has some."""
    major, minor = capability
    return f"{major}{minor}a" if (major, minor) in ((9, 0), (10, 0)) else f"{major}{minor}"


def build_command(wanted: str) -> tuple[list[str], dict[str, str]] | None:
    """How to build the extension for this machine's GPU; None where that is not wanted or not possible.

    Args:
        wanted: "auto": where the extension that is there can't run CUDA kernels here; "yes"; "no".
    """
    import torch

    if wanted == "no" or (wanted == "auto" and not torch.cuda.is_available()):
        return None
    from stream_r1_kernels import backends

    if wanted == "auto" and "cuda" not in backends.unavailable():
        return None
    archs = os.environ.get("STREAM_R1_CUDA_ARCHS") or (
        arch_of(torch.cuda.get_device_capability()) if torch.cuda.is_available() else "80"
    )
    environment = {"STREAM_R1_CUDA": "1", "STREAM_R1_CUDA_ARCHS": archs}
    return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], environment


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="S", help="seconds in all (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu-check", metavar="DIR")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the stages, small"
    )
    parser.add_argument("--stages", metavar="A,B", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument(
        "--build", choices=("auto", "yes", "no"), default="auto", help="the extension (%(default)s)"
    )
    parser.add_argument(
        "--extension", type=Path, metavar="DIR", help="a build to use: _C*.so and _build.json"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="write the machine's section into this page"
    )
    parser.add_argument("--page-only", action="store_true", help="run nothing: --page from what --out holds")
    asked = parser.parse_args(arguments)
    if asked.page is not None and (asked.page.is_dir() or not asked.page.absolute().parent.is_dir()):
        parser.error(f"--page: expected a file in a folder that is there, got {asked.page}")
    asked.out.mkdir(parents=True, exist_ok=True)
    out = asked.out.resolve()
    if asked.page_only:
        return _write_page(parser, out, asked.page)
    chosen = asked.stages.split(",") if asked.stages else list(NAMES)
    if unknown := [name for name in chosen if name not in NAMES]:
        parser.error(f"--stages: expected some of {', '.join(NAMES)}, got {unknown[0]!r}")
    if not asked.budget > 0:
        parser.error(f"--budget: expected more than 0 seconds, got {asked.budget:g}")
    if asked.extension is not None:
        if not list(asked.extension.glob("_C*.so")):
            parser.error(f"--extension: expected a folder with _C*.so, got {asked.extension}")
        os.environ["STREAM_R1_EXTENSION"] = str(asked.extension.resolve())
    if importlib.util.find_spec("torch") is None:
        print(f"gpu-check: {sys.executable} has no torch: nothing can be checked")
        return NO_GPU
    build = None if asked.extension is not None else build_command(asked.build)
    runner = Runner(out, asked.budget, asked.device, build)
    well = runner.run([stage for stage in STAGES if stage.name in chosen])
    print(f"gpu-check: {runner.results} has what was found; {out / 'summary.md'} sums it up")
    import torch

    if asked.device == "cuda" and not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} finds no GPU: nothing was measured")
        return NO_GPU
    if asked.page is not None:
        _write_page(parser, out, asked.page)
    return 0 if well else 1


def _write_page(parser: argparse.ArgumentParser, out: Path, page: Path | None) -> int:
    from benchmarks.gpu_check.page import put_section, section

    results = out / "results.jsonl"
    if page is None or not results.exists():
        parser.error(f"--page-only: expected --page FILE and {results}")
    text = section(records.read(results))
    put_section(page, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
