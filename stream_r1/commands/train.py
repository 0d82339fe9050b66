"""``stream-r1 train``: train by a recipe, resuming where an earlier run stopped.

Started by torchrun, all its processes train together: the first one talks and writes.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax

from stream_r1 import recipe as recipes
from stream_r1.commands.outputs import check_folder
from stream_r1.recipe import InitRecipe, Recipe

if TYPE_CHECKING:
    from stream_r1.distill.initialise import InitTrainer
    from stream_r1.distill.ranks import Ranks
    from stream_r1.distill.trainer import DistillTrainer

CHECKPOINTS = "checkpoints"
STUDENT = "student"
ADAPTER = "adapter"


def run(path: Path, overrides: list[str], *, check: bool, fresh: bool) -> None:
    """Check the recipe; unless that is all, train, export the student and say where it is."""
    # Before the group is there, every process finds the same and one a machine tells it.
    talks = os.environ.get("LOCAL_RANK", "0") == "0"
    console = Console(quiet=not talks)
    try:
        recipe = recipes.load_any(path, overrides)
        if not check:
            recipe.watch.require_packages()
            for part in ("", CHECKPOINTS, STUDENT, ADAPTER):
                reads = recipe.inputs(path) if part else {}
                check_folder("out", Path(recipe.out) / part, reads)
    except ValueError:
        if talks:
            raise
        sys.exit(2)
    if check:
        show(console, recipe)
        return
    from stream_r1.distill.ranks import join

    with join(recipe.distributed) as ranks:
        if not ranks.first:
            console = Console(quiet=True)
            warnings.simplefilter("ignore")
        stopped_by = _train(recipe, ranks, console, fresh=fresh)
    if stopped_by:
        sys.exit(128 + stopped_by)


def _train(recipe: Recipe | InitRecipe, ranks: Ranks, console: Console, *, fresh: bool) -> int:
    """The signal that stopped the run before its end; 0: none did."""
    from stream_r1.commands.progress import DistillationDisplay, set_aside

    out = Path(recipe.out)
    with console.status("loading the models"):
        trainer = _trainer(recipe, ranks, out, fresh=fresh)
    resumed = trainer.resume()
    if resumed is not None:
        console.print(f"going on from {resumed}", soft_wrap=True)
    if trainer.step >= recipe.steps:
        for event in trainer.set_aside:
            console.print(set_aside(event), soft_wrap=True, markup=False)
        console.print(f"all {recipe.steps} steps are done; steps=N goes further, --fresh starts over")
        _export(trainer, out, console)  # again: the run may have been killed while it did
        return 0

    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.yaml").write_text(recipe.as_yaml(), encoding="utf-8")
    from stream_r1.watch.watcher import Watcher

    def warn(text: str) -> None:
        console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)

    title = "distilling" if isinstance(recipe, Recipe) else "training the start"
    watcher = Watcher(trainer, recipe.watch, out, config=recipe.model_dump(mode="json"), warn=warn)
    with watcher, DistillationDisplay(console, title, recipe.steps, trainer.step) as display:
        for event in trainer.run():
            display.show(event)
            watcher.see(event)
    _export(trainer, out, console)
    if trainer.stopped:
        name = signal.Signals(trainer.stopped_by).name
        where = f"after step {trainer.step} of {recipe.steps}"
        console.print(f"stopped by {name} {where}; the same command goes on from here", soft_wrap=True)
    return trainer.stopped_by


def _export(trainer: DistillTrainer | InitTrainer, out: Path, console: Console) -> None:
    from stream_r1.distill.lora import is_adapted

    trainer.export(out / STUDENT)
    console.print(f"student: {out / STUDENT}", soft_wrap=True)
    if is_adapted(trainer.student):
        trainer.export_adapter(out / ADAPTER)
        console.print(f"adapter: {out / ADAPTER}", soft_wrap=True)


def _trainer(
    recipe: Recipe | InitRecipe, ranks: Ranks, out: Path, *, fresh: bool
) -> DistillTrainer | InitTrainer:
    from stream_r1 import assembly

    assembly.require_models(recipe, unused=("teacher",) if isinstance(recipe, InitRecipe) else ())
    if fresh and ranks.first:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    ranks.barrier()
    if isinstance(recipe, InitRecipe):
        return assembly.make_init_trainer(recipe, out / CHECKPOINTS, ranks)
    return assembly.make_trainer(recipe, assembly.load_models(recipe, ranks), out / CHECKPOINTS, ranks)


def show(console: Console, recipe: Recipe | InitRecipe) -> None:
    """Print the resolved settings."""
    console.print(Syntax(recipe.as_yaml(), "yaml", background_color="default", word_wrap=True))
