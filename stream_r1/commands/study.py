"""``stream-r1 study``: train and judge every arm with every seed, then write the tables and the page."""

from __future__ import annotations

import time
from pathlib import Path

from stream_r1.commands.console import make_console
from stream_r1.commands.outputs import check_folder
from stream_r1.commands.progress import duration, progress_bar
from stream_r1.disk.lock import folder_lock
from stream_r1.recipe import locate
from stream_r1.study.plan import Run, Study, load
from stream_r1.study.report import write_report
from stream_r1.study.run import Cost, Runner, is_done, require_same


def run(path: Path, overrides: list[str], *, jobs: int, trainer: str | None, report_only: bool) -> None:
    """Everything that is not done; the page is rewritten after every run."""
    console = make_console(lasting=True)
    study = load(path, overrides)
    check_folder(
        "out", study.out, study.runs[0].recipe.inputs(study.settings.recipe) | {"study": locate(path)}
    )
    require_same(study)
    if report_only:
        console.print(str(write_report(study)), soft_wrap=True, highlight=False)
        return
    with folder_lock(study.out):
        _work(study, path, overrides, jobs, trainer)
    console.print(str(write_report(study)), soft_wrap=True, highlight=False)


def _work(study: Study, path: Path, overrides: list[str], jobs: int, trainer: str | None) -> None:
    console = make_console(lasting=True)
    started, already = time.monotonic(), sum(map(is_done, study.runs))
    bar = progress_bar(console, "runs")
    task = bar.add_task("studying", total=len(study.runs), completed=already, left="")

    def on_done(run: Run, cost: Cost) -> None:
        bar.advance(task)
        done = int(bar.tasks[0].completed)
        left = (time.monotonic() - started) / (done - already) * (len(study.runs) - done)
        bar.update(task, left=f"{duration(left)} left")
        spent = duration(cost.seconds + cost.judged_seconds)
        bar.console.print(
            f"{run.arm}, seed {run.seed}: {spent}; {done} / {len(study.runs)} runs, {duration(left)} left",
            highlight=False,
            soft_wrap=True,
        )
        write_report(study)

    with bar:
        Runner(study, (path, overrides), jobs=jobs, trainer=trainer, on_done=on_done).run()
