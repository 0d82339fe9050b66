"""tests/gpu in several processes. A test that hangs or brings its process down costs itself alone."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.context import CannotRunError, Context

ROOT = Path(__file__).parents[3]
FOLDER = "tests/gpu"
SECONDS = 25.0  # that a test may take; the first one in a process starts the device, and may compile
STARTING = 60.0  # that pytest may take before its first test
# Settings of the project's own that need plugins, or files that nobody should leave here.
OPTIONS = ("-q", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider")


def run(context: Context) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise CannotRunError("pytest is not installed")
    with tempfile.TemporaryDirectory() as folder:
        tests = _collected(Path(folder), context)
        count = max(1, min(4, (os.cpu_count() or 1) // 2, len(tests)))
        names = list(tests)
        workers = [
            _Worker({name: tests[name] for name in names[i::count]}, Path(folder) / f"{i}.jsonl")
            for i in range(count)
        ]
        try:
            busy = workers
            while busy:
                busy = [worker for worker in busy if worker.look(context)]
                time.sleep(0.1)
        finally:
            for worker in workers:
                worker.stop()
    failed = [name for worker in workers for name, outcome in worker.outcomes.items() if outcome != "passed"]
    context.record("tests", passed=len(tests) - len(failed), failed=len(failed), processes=count)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(tests)} tests did not pass")


def _collected(folder: Path, context: Context) -> dict[str, str]:
    """Tests by name, as pytest takes them."""
    file = folder / "collected.jsonl"
    process = _pytest([FOLDER, "--collect-only"], file, context)
    rc = process.wait(max(1.0, context.left))
    found = next((line["tests"] for line in _lines(file, 0)[0] if "tests" in line), {})
    if rc != 0 or not found:
        raise CannotRunError(f"pytest could not collect {FOLDER} (exit code {rc}), see log.txt")
    return found


def _pytest(arguments: Sequence[str], report: Path, context: Context) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", *OPTIONS, "-p", "benchmarks.gpu_check.reporter", *arguments]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if context.small else {}
    environment = os.environ | {"GPU_CHECK_REPORT": str(report), "OMP_NUM_THREADS": "1"} | hidden
    return subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0)


def _lines(file: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Whole lines from `start` on, and where they end."""
    if not file.exists():
        return [], start
    with file.open("rb") as opened:
        opened.seek(start)
        text = opened.read()
    whole = text[: text.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], start + len(whole)


@dataclass
class _Worker:
    """A process that runs some of the tests, started again without a test that ended it."""

    tests: dict[str, str]  # by name, as pytest takes them
    report: Path
    outcomes: dict[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _read: int = 0
    _under_way: tuple[str, float] | None = None  # a test and when it began
    _started: float = 0.0

    def look(self, context: Context) -> bool:
        """Keeps what is known by now; False when all tests have an outcome."""
        if self._process is None:
            left = self._left()
            if not left:
                return False
            self._process, self._started, self._under_way = (
                _pytest([self.tests[name] for name in left], self.report, context),
                time.time(),
                None,
            )
            return True
        ended = self._process.poll() is not None  # asked before the report is read: then it is whole
        for line in self._news():
            if "begins" in line:
                self._under_way = line["begins"], time.time()
            elif "test" in line:
                self._keep(context, line["test"], line["outcome"], line["seconds"], line["why"])
        if ended:
            self._died(context, f"its process ended with {self._process.returncode}")
        elif self._too_long():
            self.stop()
            self._died(context, "timed out")
        return True

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(3)

    def _news(self) -> Iterator[dict[str, Any]]:
        lines, self._read = _lines(self.report, self._read)
        yield from lines

    def _left(self) -> list[str]:
        return [name for name in self.tests if name not in self.outcomes]

    def _too_long(self) -> bool:
        if self._under_way is None:
            return time.time() - self._started > STARTING
        return time.time() - self._under_way[1] > SECONDS

    def _died(self, context: Context, why: str) -> None:
        self._process = None
        left = self._left()
        if left:
            name = self._under_way[0] if self._under_way and self._under_way[0] in left else left[0]
            self._keep(context, name, why, 0.0, "")

    def _keep(self, context: Context, name: str, outcome: str, seconds: float, why: str) -> None:
        if name not in self.outcomes:
            self.outcomes[name] = outcome
            context.record("test", name=name, outcome=outcome, seconds=seconds, why=why)
