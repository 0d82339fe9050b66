"""``stream-r1 demo``: the demo with a live display, and its report."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from stream_r1 import recipe as recipes
from stream_r1.commands.console import make_console
from stream_r1.commands.outputs import check_folder
from stream_r1.config import SettingsError, build, parse_overrides
from stream_r1.demo.record import Record
from stream_r1.demo.report import write_report
from stream_r1.demo.settings import DemoSettings
from stream_r1.disk.lock import folder_lock
from stream_r1.disk.whole import clear_partial

RECIPE = "recipes/tiny/stream-r1.yaml"


def run(
    out: Path,
    recipe: Path | None,
    overrides: list[str],
    settings: list[str],
    *,
    fresh: bool,
    report_only: bool,
    take_over: bool = False,
) -> None:
    """Run what is not done yet, then write the report; with ``report_only``, only that."""
    console = make_console(lasting=True)
    if report_only:
        record = Record.load(out)
        if record is None:
            raise SettingsError(f"{out}: no run to report on; stream-r1 demo --out {out} makes one")
        _tell(console, write_report(record, out), record)
        return
    source = str(recipe or RECIPE)
    chosen = build(DemoSettings, parse_overrides(settings), "--set")
    loaded = recipes.load(source, overrides)
    reads = loaded.inputs(source)
    reads |= {name: recipes.locate(getattr(chosen, name)) for name in ("reference", "judge")}
    check_folder("--out", out, reads)
    title = Text.assemble(("Stream-R1", "bold"), f", the tiny world: {source}, {chosen.budget:.0f} s in all")
    console.print(title)
    with folder_lock(out, take_over=take_over):
        clear_partial(out, everything=True)
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
            console.print(f"resuming the run in {out}", highlight=False)
        try:
            record = demo.run()
        finally:
            if demo.record.clips:
                _tell(console, write_report(demo.record, out), demo.record)
        if record.stopped:
            console.print("stopped; the same command resumes from here")
            sys.exit(128 + demo.stopped_by)


def _tell(console: Console, page: Path, record: Record) -> None:
    if record.timing is not None:
        console.print(
            f"streams at {record.timing.fps:.1f} fps, "
            f"first frame after {1000 * record.timing.first_frame:.0f} ms"
        )
    console.print(
        Text.assemble(
            (f"report: {page}", "bold"),
            f"  ({page.stat().st_size / 2**20:.1f} MB, opens in a browser)",
        ),
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
