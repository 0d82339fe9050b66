"""Compares ours with its baselines after a run; with `--report FOLDER` writes the report (see report.py)."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import ceilings, report

CEILINGS = pytest.StashKey[ceilings.Ceilings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--report", metavar="FOLDER", help="write benchmarks.md, benchmarks.json and roofline.svg there"
    )


def pytest_configure() -> None:
    """Keep freed memory in the process, as a long run of equal steps does.

    Otherwise what is timed at large sizes is the kernel clearing fresh pages: several times an op's own time,
    and by the history of the heap sometimes for one implementation and not for the other.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


@pytest.fixture(scope="session", autouse=True)
def measured_ceilings(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--report"):
        request.config.stash[CEILINGS] = ceilings.measure()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    benchmarks = session.benchmarks if session is not None else ()
    timings = [timing for timing in map(report.timing_of, benchmarks) if timing is not None]
    comparisons = [
        c for c in report.compare(timings, config.stash.get(CEILINGS, ceilings.Ceilings())) if c.baselines
    ]
    if not comparisons:
        return
    terminalreporter.section("ours against its baselines (median time of the baseline / median time of ours)")
    for comparison in comparisons:
        ratios = ", ".join(f"{r.implementation} {comparison.ratio(r):.2f}x" for r in comparison.baselines)
        median = comparison.ours.percentile(50) * 1e3
        terminalreporter.write_line(f"{comparison.ours.case:<70} {median:9.3f} ms   {ratios}")
    if folder := config.getoption("--report"):
        report.write(Path(folder), timings, _this_run(config.stash[CEILINGS]))
        terminalreporter.write_line(f"wrote {folder}/benchmarks.md, benchmarks.json, roofline.svg")


def _this_run(measured: ceilings.Ceilings) -> report.Run:
    return report.Run(
        machine=_processor(),
        isa=torch.ops.stream_r1.cpu_isa(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        commit=_commit(),
        ceilings=measured,
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
