"""Trains and judges every run of a study that is not done, several at once.

A run is two processes: ``stream-r1 train`` on its recipe, which resumes where it was stopped, then
``stream_r1.study.measure``. What is done is in files of the run's folder, so a study that was killed at any
moment continues.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from stream_r1.disk.fingerprint import fingerprint
from stream_r1.disk.origin import keep_origin, require_origin
from stream_r1.disk.whole import write_text
from stream_r1.files import FileError, read_json
from stream_r1.recipe import locate
from stream_r1.study.measure import FIGURES
from stream_r1.study.plan import Run, Study

COST = "cost.json"
LOG = "log.txt"
STUDENT = "student"
CHECKPOINTS = "checkpoints"


class RunFailedError(RuntimeError):
    """A run's process ended with an error; the message is its last line."""


@dataclass
class Cost:
    """What a run took so far.

    seconds: of its training, all attempts together. peak_bytes: the largest resident memory of a training
    process. trained: the training is done. judged_seconds: of the judging.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    trained: bool = False
    judged_seconds: float = 0.0

    @classmethod
    def of(cls, folder: Path) -> Cost:
        """As the file in a run's folder has it; nothing if there is none."""
        path = folder / COST
        if not path.exists():
            return cls()
        found = read_json(path)
        try:
            return cls(**found)
        except TypeError:
            raise FileError(f"{path}: expected {', '.join(asdict(cls()))}, got {', '.join(found)}") from None

    def save(self, folder: Path) -> None:
        write_text(folder / COST, json.dumps(asdict(self), indent=1) + "\n")


def is_done(run: Run) -> bool:
    """Whether a run is trained and judged."""
    return (run.folder / FIGURES).is_file()


def origin(study: Study, run: Run) -> dict[str, Any]:
    """What decides a run's figures: settings, the models' files, and what judges."""
    settings, recipe = study.settings, run.recipe
    judged_by = [locate(place) for place in (settings.judge, settings.reference) if place]
    return {
        **recipe.distillation().maths(),
        **recipe.origin(),
        **recipe.model_dump(mode="json", include={"steps", "guard"}),
        "prompts": fingerprint([locate(recipe.prompts)], recipe.prompts),
        "videos": settings.videos,
        "shown": list(settings.shown),
        "judge and reference": fingerprint(judged_by),
    }


def require_same(study: Study) -> None:
    """Raises SettingsError when a run was begun with other settings, models or judges than the study's."""
    for run in (run for run in study.runs if run.folder.is_dir()):
        require_origin(run.folder, origin(study, run), run.folder / FIGURES)


class Runner:
    """Works through a study.

    Args:
        study: what to run.
        source: the study's file and the overrides on it: the judging processes read them again.
        jobs: runs at a time; each has its part of the cores, and of the GPUs where there are any.
        trainer: the command that trains, before the recipe; for models that need several GPUs a launcher, as
            "torchrun --nproc-per-node 8 -m stream_r1".
        on_done: is called with each run that is done, from any thread.
    """

    def __init__(
        self,
        study: Study,
        source: tuple[Path, list[str]],
        *,
        jobs: int,
        trainer: str | None,
        on_done: Callable[[Run, Cost], None],
    ) -> None:
        self.study, self.jobs, self.on_done = study, jobs, on_done
        self._path, self._overrides = source
        self._trainer = shlex.split(trainer) if trainer else [sys.executable, "-m", "stream_r1"]
        self._waiting = deque(run for run in study.runs if not is_done(run))
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self) -> None:
        """Everything that is not done.

        Raises RunFailedError when a run's process failed. Then, as on an interrupt, the other processes are
        asked to stop, which keep what they have, and are waited for.
        """
        with ThreadPoolExecutor(self.jobs) as pool:
            workers = [pool.submit(self._work, slot) for slot in range(self.jobs)]
            try:
                for worker in workers:
                    worker.result()
            except BaseException:
                self._stop()
                raise

    def _work(self, slot: int) -> None:
        while True:
            with self._lock:
                if self._stopped or not self._waiting:
                    return
                run = self._waiting.popleft()
            self._one(run, slot)

    def _one(self, run: Run, slot: int) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / LOG, "ab") as log:
            cost = Cost.of(run.folder)
            if not cost.trained:
                keep_origin(run.folder, origin(self.study, run))
                recipe = run.folder / "arm.yaml"
                write_text(recipe, run.recipe.as_yaml())
                seconds, peak = self._process([*self._trainer, "train", str(recipe)], slot, log, run)
                cost.seconds += seconds
                cost.peak_bytes = max(cost.peak_bytes, peak)
                cost.trained = True
                cost.save(run.folder)
            which = [str(self._path), run.arm, str(run.seed), *self._overrides]
            command = [sys.executable, "-m", "stream_r1.study.measure", *which]
            cost.judged_seconds, _ = self._process(command, slot, log, run)
            cost.save(run.folder)
        self.on_done(run, cost)

    def _process(self, command: list[str], slot: int, log: IO[bytes], run: Run) -> tuple[float, int]:
        """Seconds and the largest resident memory in bytes of a process that ended well."""
        started = time.monotonic()
        with self._lock:
            if self._stopped:
                raise RunFailedError(f"{run.folder}: stopped")
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment(slot))
            self._processes.add(process)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        with self._lock:
            self._processes.discard(process)
        seconds = time.monotonic() - started
        if process.returncode:
            cost = Cost.of(run.folder)
            cost.seconds += seconds
            cost.save(run.folder)
            raise RunFailedError(f"{run.folder}: {_last_line(run.folder / LOG)}")
        scale = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        return seconds, usage.ru_maxrss * scale

    def _environment(self, slot: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self.jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // self.jobs))
            gpus = torch.cuda.device_count()
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
        return environment

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"no word in {path}"
