"""The demo, stage by stage: stream and evaluate before, distil, stream and evaluate after, look closer.

Every stage leaves its result in the run's record, so a run that was stopped resumes where it was.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Protocol

import torch

from stream_r1 import __version__
from stream_r1.assembly import Models, load_models, make_trainer, require_models
from stream_r1.config import SettingsError
from stream_r1.demo import stages
from stream_r1.demo.baselines import OtherBaselinesError, load_baselines, measured_with
from stream_r1.demo.record import FILE as RECORD
from stream_r1.demo.record import Number, Record, StepPoint
from stream_r1.demo.report import LABELS
from stream_r1.demo.settings import DemoSettings, seconds_to_distil, steps_in
from stream_r1.disk.fingerprint import fingerprint
from stream_r1.distill.events import Event, StepDone
from stream_r1.distill.trainer import DistillTrainer
from stream_r1.drawn_world import Scene
from stream_r1.evaluation import Reference, evaluate_videos
from stream_r1.messages import shown
from stream_r1.models.checkpoints import load_student
from stream_r1.recipe import Recipe, locate
from stream_r1.rewards import load_reward
from stream_r1.sampling.sampler import Sampler

CHECKPOINTS = "checkpoints"
STUDENT = "student"
MAPS = "maps.npz"


class TrainingWatcher(Protocol):
    """Observes the distillation."""

    def show(self, event: Event) -> None: ...

    def plan(self, total: int, seconds_left: float) -> None:
        """There are going to be so many steps, for so long."""
        ...


class Watcher(Protocol):
    """Observes the demo; nothing in here prints."""

    def stage(self, title: str) -> AbstractContextManager[object]: ...

    def distillation(self, total: int, done: int) -> AbstractContextManager[TrainingWatcher]: ...


class Demo:
    """One run in one folder.

    Args:
        recipe: what to distil, and how; its `steps` are the most there can be.
        settings: of the demo around it.
        folder: where everything goes; what an earlier run with the same settings left there is gone on from.
        watcher: is told what happens.
        source: the recipe's name, for the report.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: DemoSettings,
        folder: Path,
        watcher: Watcher,
        *,
        source: str,
    ) -> None:
        require_models(recipe)
        for prompt in (*settings.prompts, *stages.evaluated_prompts(recipe, settings)):
            if not Scene.has(prompt):
                raise SettingsError(f"prompts: expected those of the drawn world, got {shown(prompt)}")
        self.recipe, self.settings, self.folder, self.watcher = recipe, settings, folder, watcher
        self.reference = Reference.load(locate(settings.reference))
        self.judge = load_reward(locate(settings.judge))
        self.stopped_by = int(signal.SIGINT)
        self._models: Models | None = None
        self._baselines: dict[str, dict[str, Number]] = {}
        self._baselines_said = "Teacher and drawings were measured when the assets were made."
        try:
            self._baselines = load_baselines(locate(settings.baselines), measured_with(recipe, settings))
        except OtherBaselinesError as error:
            self._baselines_said = (
                f"No teacher and drawings: {error} (stream-r1 data baselines measures them)."
            )
        mark = _fingerprint(recipe, settings)
        record = Record.load(folder)
        if record is None or record.fingerprint != mark:
            clear(folder)
            record = Record(
                fingerprint=mark,
                started=datetime.now().strftime("%Y-%m-%d %H:%M"),
                recipe=source,
                seed=settings.seed,
                budget=settings.budget,
                machine=_machine(),
                prompts=list(settings.prompts),
                settings=recipe.as_yaml(),
                denoising_steps=len(recipe.rollout.steps),
                teacher_steps=settings.teacher_steps or None,
            )
            record.save(folder)
        self.record = record

    def run(self) -> Record:
        """Everything that is not done yet. Ctrl-C ends it early; the record says so."""
        if self.record.finished:
            return self.record
        self.record.stopped = False
        try:
            self._before()
            if not self._distil():
                raise KeyboardInterrupt
            self._after()
            self.record.finished = True
        except KeyboardInterrupt:
            self.record.stopped = True
        self.record.save(self.folder)
        return self.record

    @property
    def models(self) -> Models:
        """Loaded when first needed, before the stage that needs them."""
        if self._models is None:
            with self._stage("loading", "loading the models"):
                self._models = load_models(self.recipe)
                self._describe(self._models)
        return self._models

    def _before(self) -> None:
        record, settings = self.record, self.settings
        if "before" not in record.evaluations:
            sampler = self._sampler()
            with self._stage("streaming before", "streaming the student before"):
                record.clips["before"] = stages.stream_prompts(sampler, settings, self.folder, "before")
            with self._stage("evaluating before", "evaluating the student before"):
                self._evaluate("before", sampler)
        if settings.teacher_steps and "teacher" not in record.clips:
            models = self.models
            with self._stage("sampling the teacher", "sampling the teacher"):
                record.clips["teacher"] = stages.sample_teacher(models, self.recipe, settings, self.folder)
        if "drawings" not in record.clips:
            record.clips["drawings"] = stages.show_drawings(settings, self.folder)

    def _distil(self) -> bool:
        """Steps until the budget or the recipe's steps are used up; False if somebody stopped it earlier."""
        record = self.record
        if (self.folder / STUDENT).is_dir():
            return True
        trainer = make_trainer(self.recipe, self.models, self.folder / CHECKPOINTS)
        trainer.resume()
        record.clips.pop("after", None)
        record.steps = [point for point in record.steps if point.step <= trainer.step]
        to_repeat = record.stages.get("streaming before", 0.0) + record.stages.get("evaluating before", 0.0)
        seconds = seconds_to_distil(self.settings, sum(record.stages.values()), to_repeat)
        with self._stage("distilling", None):
            budget_used = self._train(trainer, seconds)
        done = budget_used or not trainer.stopped
        self.stopped_by = trainer.stopped_by or self.stopped_by
        folder = self.folder / (STUDENT if done else STUDENT + "-stopped")
        trainer.export(folder)
        if not done:
            with self._stage("streaming after", "streaming the student as it is now"):
                sampler = self._sampler(folder)
                record.clips["after"] = stages.stream_prompts(sampler, self.settings, self.folder, "after")
        return done

    def _train(self, trainer: DistillTrainer, seconds: float) -> bool:
        """Train for `seconds`; True if they, or the planned steps, were used up."""
        record, period = self.record, self.recipe.critic_updates
        already = record.stages.get("distilling", 0.0)
        started = last = time.monotonic()
        durations: list[float] = []
        used = False
        with self.watcher.distillation(record.planned_steps or self.recipe.steps, trainer.step) as watcher:
            watcher.plan(record.planned_steps or self.recipe.steps, seconds)
            for event in trainer.run():
                watcher.show(event)
                if not isinstance(event, StepDone):
                    continue
                now = time.monotonic()
                durations.append(now - last)
                last = now
                self._note(event, already + now - started)
                if len(durations) % period:
                    continue
                left = seconds - (now - started)
                more = steps_in(left, durations, period)
                planned = min(self.recipe.steps, event.step + more)
                watcher.plan(planned, left)
                record.planned_steps = planned
                counted = durations[period:] or durations
                record.step_seconds = period * sum(counted) / len(counted)
                record.save(self.folder)
                if more < period and not used:
                    used = True
                    trainer.stop()
        return used

    def _note(self, event: StepDone, elapsed: float) -> None:
        """One point of the curves for each step of the student."""
        scalars, record = event.scalars, self.record
        record.critic_steps = event.step
        if "student/loss" in scalars:
            record.steps.append(
                StepPoint(
                    step=event.step,
                    elapsed=elapsed,
                    generator_loss=scalars["student/loss"],
                    scores={
                        axis: scalars[f"reward/{axis}"] for axis in record.axes if f"reward/{axis}" in scalars
                    },
                    weight=scalars.get("inter/mean"),
                )
            )
        if record.steps:
            record.steps[-1].critic_loss = scalars["critic/loss"]

    def _after(self) -> None:
        record, settings, folder = self.record, self.settings, self.folder
        sampler = self._sampler(folder / STUDENT)
        if "after" not in record.clips:
            with self._stage("streaming after", "streaming the student after"):
                record.clips["after"] = stages.stream_prompts(sampler, settings, folder, "after")
        if record.timing is None:
            with self._stage("timing", "timing a stream"):
                record.timing = stages.time_stream(sampler, settings)
        if "after" not in record.evaluations:
            with self._stage("evaluating after", "evaluating the student after"):
                self._evaluate("after", sampler)
        if record.maps is None:
            with self._stage("looking", "looking through the reward"):
                stages.look(sampler, self.models, self.recipe, settings, folder / MAPS)
                record.maps = MAPS

    def _sampler(self, student: Path | None = None) -> Sampler:
        """With the student of the recipe, or of a folder."""
        models = self.models
        loaded = models.student if student is None else load_student(student)
        return stages.make_sampler(loaded.eval(), models, self.recipe)

    def _evaluate(self, name: str, sampler: Sampler) -> None:
        videos, prompts = stages.sample(sampler, self.recipe, self.settings)
        figures = evaluate_videos(videos, prompts, self.reference, self.judge)
        for column in ("teacher", "drawings"):
            self.record.evaluations[column] = self._baselines.get(column, {})
        self.record.evaluations[name] = {key: Number.of(figure) for key, figure in figures.items()}

    def _describe(self, models: Models) -> None:
        record, shape, vae = self.record, self.recipe.rollout, models.vae
        record.axes = list(models.reward.axes)
        record.size = (shape.height * vae.spatial_factor, shape.width * vae.spatial_factor)
        record.chunk_frames = models.student.config["frames_per_chunk"] * vae.temporal_factor
        frames = vae.frames(shape.frames)
        record.judge_axes = list(self.judge.axes)
        record.evaluated = (
            f"Means over {self.settings.evaluated_videos} videos of {frames} frames, prompts and noise the "
            "same before and after, ± their standard error (jackknife over the videos; of the change, in "
            "pairs). "
            f"{self._baselines_said}"
        )

    @contextmanager
    def _stage(self, name: str, title: str | None) -> Iterator[None]:
        """Times a stage into the record and keeps the record, however the stage ends."""
        started = time.monotonic()
        try:
            with nullcontext() if title is None else self.watcher.stage(title):
                yield
        finally:
            self.record.stages[name] = self.record.stages.get(name, 0.0) + time.monotonic() - started
            self.record.save(self.folder)


def clear(folder: Path) -> None:
    """Remove what an earlier run left in its folder, and nothing else.

    Raises SettingsError where such files are there without a run's record: they are somebody else's.
    """
    clips = [f"{name}-*.{suffix}" for name in LABELS for suffix in ("mp4", "png")]
    left = [path for pattern in (*clips, MAPS, "index.html") for path in folder.glob(pattern)]
    left += [
        folder / name for name in (CHECKPOINTS, STUDENT, STUDENT + "-stopped") if (folder / name).exists()
    ]
    record = folder / RECORD
    if left and not record.is_file():
        raise SettingsError(
            f"{folder}: expected a new folder or that of an earlier demo, got one with {left[0].name}"
        )
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    record.unlink(missing_ok=True)  # last: what a killed process leaves of the others is still a demo's


def _fingerprint(recipe: Recipe, settings: DemoSettings) -> str:
    """Of everything that a resumed run must share with its beginning."""
    folders = [locate(folder) for folder in recipe.models.model_dump(exclude_none=True).values()]
    measured_by = [locate(settings.judge), locate(settings.reference)]
    asked = recipe.model_dump(mode="json"), settings.model_dump(mode="json")
    return fingerprint([*folders, *measured_by], *asked)


def _machine() -> dict[str, str]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in _lines(Path("/proc/cpuinfo"))
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "software": f"stream-r1 {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
