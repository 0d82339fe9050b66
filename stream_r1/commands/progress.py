"""How a distillation shows itself while it runs: live in a terminal, a line now and then in a log."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from stream_r1.distill.events import Alarm, Event, NotSaved, SetAside, StepDone
from stream_r1.messages import one_line

_BLOCKS = "▁▂▃▄▅▆▇█"
_REMEMBER = 400
_LINE_EVERY = 10.0  # seconds between lines in a log


def sparkline(values: list[float], width: int = 32) -> str:
    """Values as a row of blocks, averaged down to ``width``."""
    if not values:
        return ""
    count = min(width, len(values))
    bounds = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[round((len(_BLOCKS) - 1) * (m - low) / span)] for m in means)


def duration(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def set_aside(event: SetAside) -> str:
    """What happened to a damaged checkpoint, as a sentence."""
    return one_line(
        f"{event.reason}; it is kept as {event.path.name}, the run resumes from step {event.step}"
    )


def not_saved(event: NotSaved) -> str:
    """What became of a checkpoint, as a sentence."""
    return f"no checkpoint after step {event.step}: {event.why}; the training continues"


def alarm(event: Alarm) -> str:
    """What the guard says, as a sentence."""
    then = f"the run ends with the student of step {event.kept_step}" if event.ends else "the run continues"
    return one_line(f"guard, step {event.step}: {event.reason}; {then}")


def progress_bar(console: Console, unit: str) -> Progress:
    """A task's description, a bar, how many units are done, and the task's field `left`: the time left."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        TextColumn(f"{{task.completed:.0f}} / {{task.total:.0f}} {unit}"),
        TextColumn("[dim]{task.fields[left]}"),
        console=console,
    )


class DistillationDisplay:
    """Shows a trainer's events: step, losses, reward an axis, time left.

    with DistillationDisplay(console, "Distilling", total) as display:
        for event in trainer.run():
            display.show(event)
    """

    def __init__(self, console: Console, title: str, total: int, done: int = 0) -> None:
        self.console = console
        self.title = title
        self.started = time.monotonic()
        self.first_step = done
        self.planned_end: float | None = None
        self._history: dict[str, deque[float]] = {}
        self._skipped = 0
        self._bar = progress_bar(console, "steps")
        self._task = self._bar.add_task(title, total=total, completed=done, left="")
        self._live = Live(self._render(), console=console, refresh_per_second=4, transient=True)
        self._last_line = 0.0

    def __enter__(self) -> DistillationDisplay:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()
        task = self._bar.tasks[0]
        spent = duration(time.monotonic() - self.started)
        self.console.print(
            f"{self.title}: {task.completed:.0f} / {task.total:.0f} steps in {spent}{self._words()}",
            highlight=False,
            soft_wrap=True,
        )

    def plan(self, total: int, seconds_left: float) -> None:
        """Change how many steps there are going to be, and how long they are going to take."""
        self.planned_end = time.monotonic() + seconds_left
        self._bar.update(self._task, total=total)

    def show(self, event: Event) -> None:
        """Take in one event of ``DistillTrainer.run``."""
        if isinstance(event, SetAside):
            self.console.print(Text(set_aside(event), style="yellow"), soft_wrap=True)
        if isinstance(event, NotSaved):
            self.console.print(Text(not_saved(event), style="yellow"), soft_wrap=True)
        if isinstance(event, Alarm):
            self.console.print(Text(alarm(event), style="yellow"), soft_wrap=True)
        if not isinstance(event, StepDone):
            return
        self._remember(event)
        total = self._bar.tasks[0].total or event.steps
        left = self._seconds_left(total - event.step, event.step - self.first_step)
        self._bar.update(self._task, completed=event.step, left=f"{duration(left)} left")
        if self.console.is_terminal:
            self._live.update(self._render())
        elif time.monotonic() - self._last_line > _LINE_EVERY:
            self._last_line = time.monotonic()
            words = f"step {event.step} / {total:.0f}, {duration(left)} left{self._words()}"
            self.console.print(words, highlight=False, soft_wrap=True)

    def _seconds_left(self, steps: float, done: int) -> float:
        now = time.monotonic()
        if self.planned_end is not None:
            return self.planned_end - now
        return (now - self.started) / max(1, done) * steps

    def _remember(self, event: StepDone) -> None:
        for key, value in event.scalars.items():
            if key.endswith("/skipped"):
                self._skipped += int(value)
            elif math.isfinite(value):
                self._history.setdefault(key, deque(maxlen=_REMEMBER)).append(value)

    def _recent(self, key: str, count: int = 8) -> float | None:
        values = list(self._history.get(key, ()))[-count:]
        return sum(values) / len(values) if values else None

    def _axes(self) -> list[str]:
        return [key for key in self._history if key.startswith("reward/") and key != "reward/mean"]

    def _words(self) -> str:
        parts = []
        for key in self._axes():
            if (value := self._recent(key)) is not None:
                parts.append(f"{key.removeprefix('reward/')} {value:+.2f}")
        for key, name in (("student/loss", "student loss"), ("critic/loss", "critic loss")):
            if (value := self._recent(key)) is not None:
                parts.append(f"{name} {value:.3f}")
        if self._skipped:
            parts.append(self._skips())
        return f"  ({', '.join(parts)})" if parts else ""

    def _skips(self) -> str:
        return f"{self._skipped} update{'s' * (self._skipped > 1)} skipped, not finite"

    def _render(self) -> Group:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", min_width=18)
        table.add_column(justify="right", min_width=8)
        table.add_column(style="cyan")
        for key in self._axes():
            self._row(table, f"reward {key.removeprefix('reward/')}", key, "+.2f")
        self._row(table, "weight of a sample", "inter/mean", ".2f")
        self._row(table, "student loss", "student/loss", ".3f")
        self._row(table, "critic loss", "critic/loss", ".3f")
        if self._skipped:
            table.add_row("", "", Text(self._skips(), style="yellow"))
        hint = Text("Ctrl-C stops and keeps what there is; run again to resume", style="dim")
        return Group(self._bar, table, hint)

    def _row(self, table: Table, name: str, key: str, form: str) -> None:
        value = self._recent(key)
        if value is not None:
            table.add_row(name, format(value, form), sparkline(list(self._history[key])))
