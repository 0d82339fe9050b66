"""``stream-r1 train``: train by a recipe, resuming where an earlier run stopped.

Started by torchrun, all its processes train together: the first one talks and writes.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from stream_r1 import recipe as recipes
from stream_r1.commands.console import make_console
from stream_r1.commands.outputs import check_folder
from stream_r1.disk.lock import folder_lock
from stream_r1.disk.whole import clear_partial, write_text
from stream_r1.recipe import InitRecipe, Recipe

if TYPE_CHECKING:
    from stream_r1.distill.initialise import InitTrainer
    from stream_r1.distill.ranks import Ranks
    from stream_r1.distill.trainer import DistillTrainer

CHECKPOINTS = "checkpoints"
STUDENT = "student"
ADAPTER = "adapter"
SAMPLES = "samples"


def run(path: Path, overrides: list[str], *, check: bool, fresh: bool, take_over: bool = False) -> None:
    """Check the recipe; unless that is all, train, export the student and say where it is."""
    # Before the group is there, every process finds the same and one a machine tells it.
    talks = os.environ.get("LOCAL_RANK", "0") == "0"
    console = make_console(lasting=not check, quiet=not talks)
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
        if not ranks.is_main:
            console = make_console(quiet=True)
            warnings.simplefilter("ignore")
        with ranks.held_by_main(_folder(Path(recipe.out), take_over)):
            stopped_by = _train(recipe, ranks, console, fresh=fresh)
    if stopped_by:
        sys.exit(128 + stopped_by)


@contextmanager
def _folder(out: Path, take_over: bool) -> Iterator[None]:
    """The run's folder is this run's, without what killed ones left in it."""
    with folder_lock(out, take_over=take_over):
        for folder in (out, *out.glob(f"{SAMPLES}/*")):
            clear_partial(folder, everything=True)
        yield


def _train(recipe: Recipe | InitRecipe, ranks: Ranks, console: Console, *, fresh: bool) -> int:
    """The signal that stopped the run before its end; 0: none did."""
    from stream_r1.commands.progress import DistillationDisplay, set_aside

    out = Path(recipe.out)
    with console.status("loading the models"):
        trainer = _trainer(recipe, ranks, out, fresh=fresh)
    resumed = trainer.resume()
    if resumed is not None:
        console.print(f"resuming from {resumed}", soft_wrap=True)
    if trainer.step >= recipe.steps:
        for damaged in trainer.checkpoints.set_aside:
            console.print(set_aside(damaged), soft_wrap=True, markup=False)
        console.print(f"all {recipe.steps} steps are done; steps=N goes further, --fresh starts over")
        _export(trainer, out, console)  # again: the run may have been killed while it did
        return 0

    from stream_r1.watch.watcher import Watcher

    def warn(text: str) -> None:
        console.print(Text(text, style="yellow"), soft_wrap=True)

    if ranks.is_main:
        write_text(out / "recipe.yaml", recipe.as_yaml())

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
        console.print(f"stopped by {name} {where}; the same command resumes from here", soft_wrap=True)
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
    if fresh and ranks.is_main:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    ranks.barrier()
    if isinstance(recipe, InitRecipe):
        return assembly.make_init_trainer(recipe, out / CHECKPOINTS, ranks)
    return assembly.make_trainer(recipe, assembly.load_models(recipe, ranks), out / CHECKPOINTS, ranks)


def show(console: Console, recipe: Recipe | InitRecipe) -> None:
    """Print the resolved settings."""
    console.print(Syntax(recipe.as_yaml(), "yaml", background_color="default", word_wrap=True))
