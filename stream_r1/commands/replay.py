"""``stream-r1 replay``: recorded calls of another implementation, run through the student."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stream_r1.commands.console import make_console
from stream_r1.replay import ReplayResult, replay


def run(files: list[Path], *, tolerance: float) -> int:
    """Replay each file and show its worst relative error, and after them why files were refused.

    Returns 0 if all are within ``tolerance``, 1 if one is not, 2 if one was refused.
    """
    console = make_console()
    results: list[ReplayResult] = []
    refused: list[str] = []
    for file in files:
        with console.status(f"replaying {file.name}"):
            try:
                results.append(replay(file))
            except (OSError, ValueError) as error:
                refused.append(str(error))
    if results:
        _show(console, results, tolerance)
    for reason in refused:
        print(f"stream-r1: refused: {reason}", file=sys.stderr)
    if refused:
        return 2
    return 0 if all(_fits(result, tolerance) for result in results) else 1


def _fits(result: ReplayResult, tolerance: float) -> bool:
    return result.worst <= tolerance


def _show(console: Console, results: list[ReplayResult], tolerance: float) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("recording", overflow="fold", min_width=24)
    table.add_column("compared", justify="right")
    table.add_column("worst error", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("where", overflow="fold")
    for result in results:
        fits = _fits(result, tolerance)
        verdict = Text("ok", style="green") if fits else Text(f"past {tolerance:g}", style="red")
        table.add_row(
            Path(result.source).stem,
            str(len(result.errors)),
            f"{result.worst:.2e}",
            verdict,
            result.worst_name,
        )
    console.print(table)
    console.print("errors are relative: max |ours - recorded| / max |recorded|", style="dim")
