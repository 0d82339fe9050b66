"""Runs the stages one after the other, each within its deadline, whatever happened to the one before."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check import records
from benchmarks.gpu_check.plan import BUILD_UNTIL, STAGES, Stage
from benchmarks.gpu_check.summary import summary

ROOT = Path(__file__).parents[2]
GRACE = 3.0  # seconds between the request to end and the kill; of a process that no kill reaches, again


class Runner:
    """One run of the check.

    Args:
        out: folder for `results.jsonl`, `summary.md` and `log.txt`; what is there is kept, and added to.
        budget: seconds in all.
        device: "cuda" or "cpu" (a stand-in).
        build: command that builds the extension beside the first stages; None: there is one, or none is
            wanted.
    """

    def __init__(
        self, out: Path, budget: float, device: str, build: tuple[list[str], dict[str, str]] | None = None
    ) -> None:
        self.out, self.budget, self.device = out, budget, device
        self.began = time.time()
        self._building: subprocess.Popen[bytes] | None = None
        self._log = (out / "log.txt").open("ab")
        if build is not None:
            command, environment = build
            self._building = self._start("build", command, environment)

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    def run(self, stages: Sequence[Stage] = STAGES) -> bool:
        """Whether every stage ended well. Ctrl-C ends the stage under way and the run."""
        well = True
        under_way: subprocess.Popen[bytes] | None = None
        try:
            for stage in stages:
                if stage.kernels:
                    self._finish_build()
                deadline = self.began + stage.deadline(self.budget)
                started = time.time()
                command = [
                    *(sys.executable, "-m", "benchmarks.gpu_check.stage", stage.name),
                    *("--out", str(self.out), "--device", self.device, "--until", f"{deadline:.3f}"),
                ]
                under_way = self._start(stage.name, command, {})
                rc = self._wait(under_way, deadline)
                self._end(stage.name, rc, time.time() - started)
                well = well and rc == records.OK
        finally:
            for process in (under_way, self._building):
                if process is not None and process.poll() is None:
                    _kill(process)
            self._log.close()
        return well

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        self._log.write(f"\n=== {name}: {' '.join(command)}\n".encode())
        self._log.flush()
        print(f"gpu-check: {name}", flush=True)
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own: its children end with it
        )

    def _wait(self, process: subprocess.Popen[bytes], deadline: float) -> int:
        try:
            return process.wait(max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            _kill(process)
            return records.TIMED_OUT

    def _finish_build(self) -> None:
        if self._building is None:
            return
        process, self._building = self._building, None
        rc = self._wait(process, self.began + BUILD_UNTIL * self.budget / STAGES[-1].until)
        self._end("build", rc, time.time() - self.began)

    def _end(self, stage: str, rc: int, seconds: float) -> None:
        facts: records.Record = {"stage": stage, "rc": rc, "seconds": round(seconds, 2)}
        if rc == records.TIMED_OUT:
            facts["why"] = "past its deadline"
        elif rc != records.OK:
            said = (
                [r for r in records.read(self.results) if r["stage"] == stage]
                if self.results.exists()
                else []
            )
            reasons = [r["why"] for r in said if r.get("kind") == "stopped"]
            facts["why"] = reasons[-1] if reasons else f"exit code {rc}, see log.txt"
        records.append(self.results, facts)
        (self.out / "summary.md").write_text(summary(records.read(self.results)), encoding="utf-8")
        print(f"gpu-check: {stage}: {facts.get('why', 'done')} ({seconds:.0f} s)", flush=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process group. One that even SIGKILL does not reach (a hung driver) is left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):  # what the leader left behind
        os.killpg(process.pid, signal.SIGKILL)
