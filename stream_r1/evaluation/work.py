"""Everything of an evaluation that is not done yet: each video, then each part of each video.

A finished piece is a file, written whole, so an evaluation that was killed resumes where it stopped.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from stream_r1.evaluation.make import make_video, read_made, warm_up, weights_mark
from stream_r1.evaluation.parts import Measuring, measure, measurings, read_result
from stream_r1.evaluation.plan import Evaluation, Video
from stream_r1.evaluation.vbench_tool import missing_dimensions, run_dimension
from stream_r1.models.text import UMT5Encoder
from stream_r1.sampling.pipeline import StreamR1Pipeline

Load = Callable[[str], StreamR1Pipeline]
"""From a model's name to its pipeline."""


@dataclass
class Progress:
    """How far an evaluation is. `stages`: pieces of each by name, and how many of them are done."""

    stages: dict[str, list[int]]
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of the pieces done here

    @property
    def done(self) -> int:
        return sum(done for done, _ in self.stages.values())

    @property
    def total(self) -> int:
        return sum(total for _, total in self.stages.values())

    @property
    def left(self) -> float | None:
        """Seconds, by each stage's mean piece so far; a stage that has none counts as the others' mean."""
        known = {name: sum(times) / len(times) for name, times in self.seconds.items() if times}
        if not known:
            return None
        usual = sum(known.values()) / len(known)
        return sum((total - done) * known.get(name, usual) for name, (done, total) in self.stages.items())

    def add(self, stage: str, seconds: float) -> None:
        self.stages[stage][0] += 1
        self.seconds.setdefault(stage, []).append(seconds)


def evaluate(
    evaluation: Evaluation,
    load: Load,
    *,
    on_progress: Callable[[str, Progress], None],
    stage_done: Callable[[], object],
) -> None:
    """Do what is not done.

    Args:
        load: is called for each model that has videos to make.
        on_progress: is called with each piece's stage when it is done, and with "" before the first.
        stage_done: is called after each stage.

    Raises:
        FileError: a file of results that is damaged, or of another evaluation.
    """
    settings = evaluation.settings
    waiting: dict[str, list[Video]] = {}
    stages: dict[str, list[int]] = {}
    for model in settings.models:
        mark = weights_mark(evaluation, model)
        todo = [v for v in evaluation.videos if read_made(evaluation, model, v, mark) is None]
        waiting[model] = todo
        stages[f"{model}: videos"] = [len(evaluation.videos) - len(todo), len(evaluation.videos)]
    parts = measurings(settings)
    for part in parts:
        pieces = [(m, v) for m in settings.models for v in evaluation.videos]
        done = sum(v not in waiting[m] and read_result(evaluation, m, part, v) is not None for m, v in pieces)
        stages[part.name] = [done, len(pieces)]
    tool = settings.vbench if "vbench" in settings.parts else None
    if tool is not None and tool.python is not None:
        total = len(settings.models) * len(tool.dimensions)
        left = sum(len(missing_dimensions(evaluation, model)) for model in settings.models)
        stages["vbench"] = [total - left, total]
    progress = Progress(stages)
    on_progress("", progress)
    for model, todo in waiting.items():
        if todo:
            _make(evaluation, model, todo, load, lambda stage, s: _note(progress, stage, s, on_progress))
            stage_done()
    for part in parts:
        if stages[part.name][0] < stages[part.name][1]:
            _measure(evaluation, part, lambda stage, s: _note(progress, stage, s, on_progress))
            stage_done()
    if "vbench" in stages:
        for model in settings.models:
            for dimension in missing_dimensions(evaluation, model):
                began = time.monotonic()
                run_dimension(evaluation, model, dimension)
                _note(progress, "vbench", time.monotonic() - began, on_progress)
            stage_done()


def _note(
    progress: Progress, stage: str, seconds: float, on_progress: Callable[[str, Progress], None]
) -> None:
    progress.add(stage, seconds)
    on_progress(stage, progress)


def _make(
    evaluation: Evaluation, model: str, todo: list[Video], load: Load, note: Callable[[str, float], None]
) -> None:
    pipeline, mark = load(model), weights_mark(evaluation, model)
    if isinstance(pipeline.text_encoder, UMT5Encoder):
        pipeline.text_encoder.encode([video.prompt for video in todo])  # reads gigabytes, once
    warm_up(pipeline, todo[0].prompt)
    for video in todo:
        began = time.monotonic()
        make_video(pipeline, evaluation, model, video, mark)
        note(f"{model}: videos", time.monotonic() - began)
    del pipeline
    _free()


def _measure(evaluation: Evaluation, part: Measuring, note: Callable[[str, float], None]) -> None:
    work = part.open()
    for model in evaluation.settings.models:
        for video in evaluation.videos:
            if read_result(evaluation, model, part, video) is not None:
                continue
            made = read_made(evaluation, model, video)
            assert made is not None  # all videos are made by now
            began = time.monotonic()
            measure(evaluation, model, part, video, made, work)
            note(part.name, time.monotonic() - began)
    del work
    _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
