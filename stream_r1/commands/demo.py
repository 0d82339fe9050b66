"""``stream-r1 demo``: the demo with a live display, and its report."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from rich.console import Console

from stream_r1 import recipe as recipes
from stream_r1.commands.outputs import check_folder
from stream_r1.config import SettingsError, build, parse_overrides
from stream_r1.demo.record import Record
from stream_r1.demo.report import write_report
from stream_r1.demo.settings import DemoSettings

RECIPE = "recipes/tiny/stream-r1.yaml"


def run(
    out: Path,
    recipe: Path | None,
    overrides: list[str],
    settings: list[str],
    *,
    fresh: bool,
    report_only: bool,
) -> None:
    """Run what is not done yet, then write the report; with ``report_only``, only that."""
    console = Console()
    if report_only:
        record = Record.load(out)
        if record is None:
            raise SettingsError(f"{out}: no run to report on; stream-r1 demo --out {out} makes one")
        _tell(console, write_report(record, out), record)
        return
    source = str(recipe or RECIPE)
    chosen = build(DemoSettings, parse_overrides(settings), "--set")
    loaded = recipes.load(source, overrides)
    check_folder("--out", out, loaded.inputs(source) | {"reference": recipes.locate(chosen.reference)})
    console.print(
        f"[bold]Stream-R1[/bold], the tiny world: {source}, {chosen.budget:.0f} s in all", highlight=False
    )
    with console.status("starting"):
        from stream_r1.demo.run import Demo, clear

        if fresh:
            clear(out)
        demo = Demo(loaded, chosen, out, _Screen(console), source=source)
    if demo.record.finished:
        console.print(
            "this run is done; --fresh starts over, --set budget=SECONDS makes another", highlight=False
        )
    elif demo.record.stages:
        console.print(f"going on with the run in {out}", highlight=False)
    try:
        record = demo.run()
    finally:
        if demo.record.clips:
            _tell(console, write_report(demo.record, out), demo.record)
    if record.stopped:
        console.print("stopped; the same command goes on from here")
        sys.exit(130)


def _tell(console: Console, page: Path, record: Record) -> None:
    if record.timing is not None:
        console.print(
            f"streams at {record.timing.fps:.1f} fps, "
            f"first frame after {1000 * record.timing.first_frame:.0f} ms"
        )
    console.print(
        f"[bold]report: {page}[/bold]  ({page.stat().st_size / 2**20:.1f} MB, opens in a browser)",
        soft_wrap=True,
    )


class _Screen:
    """The demo's watcher: a spinner while something runs, a line when it is done."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        started = time.monotonic()
        with self.console.status(title):
            yield
        self.console.print(f"{title}: {time.monotonic() - started:.1f} s", highlight=False)

    def distillation(self, total: int, done: int) -> AbstractContextManager:
        from stream_r1.commands.progress import DistillationDisplay

        return DistillationDisplay(self.console, "distilling", total, done)
