"""``stream-r1 eval``: make every model's videos, measure them, and write the tables and the page."""

from __future__ import annotations

from pathlib import Path

from stream_r1.commands.console import make_console
from stream_r1.commands.outputs import check_folder
from stream_r1.commands.progress import duration, progress_bar
from stream_r1.commands.sample import ModelChoice
from stream_r1.disk.lock import folder_lock
from stream_r1.evaluation import work
from stream_r1.evaluation.page import write_report
from stream_r1.evaluation.plan import Evaluation, load
from stream_r1.recipe import locate
from stream_r1.sampling.pipeline import StreamR1Pipeline


def run(path: Path, overrides: list[str], *, report_only: bool) -> None:
    """Everything that is not done; the page is rewritten after every stage."""
    console = make_console(lasting=True)
    evaluation = load(path, overrides)
    check_folder("out", evaluation.out, evaluation.inputs(locate(path)))
    if not report_only:
        with folder_lock(evaluation.out):
            _work(evaluation)
    console.print(str(write_report(evaluation)), soft_wrap=True, highlight=False)


def _work(evaluation: Evaluation) -> None:
    console = make_console(lasting=True)
    bar = progress_bar(console, "pieces")
    task = bar.add_task("evaluating", total=1, left="")
    last = ""

    def on_progress(stage: str, progress: work.Progress) -> None:
        nonlocal last
        left = "" if progress.left is None else f"{duration(progress.left)} left"
        name = stage or "evaluating"
        bar.update(task, description=name, completed=progress.done, total=progress.total, left=left)
        if stage and progress.stages[stage][0] == progress.stages[stage][1] and stage != last:
            last = stage
            done = f"{progress.done} / {progress.total}"
            bar.console.print(f"{stage}: done; {done}, {left}", highlight=False, soft_wrap=True)

    with bar:
        work.evaluate(
            evaluation,
            lambda name: _pipeline(evaluation, name),
            on_progress=on_progress,
            stage_done=lambda: write_report(evaluation),
        )


def _pipeline(evaluation: Evaluation, name: str) -> StreamR1Pipeline:
    settings = evaluation.settings
    model = settings.models[name]
    cache = settings.text_cache
    return ModelChoice(
        **model.model_dump(exclude={"checkpoint", "adapter"}),
        checkpoint=None if model.checkpoint is None else locate(model.checkpoint),
        adapter=None if model.adapter is None else locate(model.adapter),
        text_cache=None if cache is None else Path(cache),
    ).load(settings.size)
