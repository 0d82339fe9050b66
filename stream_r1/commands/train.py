"""``stream-r1 train``: distil by a recipe, resuming where an earlier run stopped."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.syntax import Syntax

from stream_r1 import recipe as recipes
from stream_r1.recipe import Recipe

if TYPE_CHECKING:
    from stream_r1.distill.events import StepDone

HISTORY = "history.jsonl"
CHECKPOINTS = "checkpoints"
STUDENT = "student"


def run(path: Path, overrides: list[str], *, check: bool, fresh: bool) -> None:
    """Check the recipe; unless that is all, train, export the student and say where it is."""
    console = Console()
    recipe = recipes.load(path, overrides)
    if check:
        show(console, recipe)
        return
    out = Path(recipe.out)
    from stream_r1.assembly import load_models, make_trainer, require_models

    require_models(recipe)
    if fresh:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        (out / HISTORY).unlink(missing_ok=True)
    with console.status("loading the models"):
        trainer = make_trainer(recipe, load_models(recipe), out / CHECKPOINTS)
    resumed = trainer.resume()
    if resumed is not None:
        console.print(f"going on from {resumed}", soft_wrap=True)
    if trainer.step >= recipe.steps:
        console.print(f"all {recipe.steps} steps are done; steps=N goes further, --fresh starts over")
        return

    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(recipe.as_yaml(), encoding="utf-8")
    _forget_after(out / HISTORY, trainer.step)
    from stream_r1.commands.progress import DistillationDisplay
    from stream_r1.distill.events import StepDone

    with (
        (out / HISTORY).open("a", encoding="utf-8") as history,
        DistillationDisplay(console, "distilling", recipe.steps, trainer.step) as display,
    ):
        for event in trainer.run():
            display.show(event)
            if isinstance(event, StepDone):
                history.write(_line(event))
                history.flush()
    trainer.export(out / STUDENT)
    console.print(f"student: {out / STUDENT}", soft_wrap=True)
    if trainer.stopped:
        console.print("stopped; the same command goes on from here")
        sys.exit(130)


def show(console: Console, recipe: Recipe) -> None:
    """Print the resolved settings."""
    console.print(Syntax(recipe.as_yaml(), "yaml", background_color="default", word_wrap=True))


def _line(event: StepDone) -> str:
    return json.dumps({"step": event.step, **event.scalars, "seconds": event.seconds}) + "\n"


def _forget_after(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run does again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")
