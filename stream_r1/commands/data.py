"""``stream-r1 data``: what the tiny world is measured by, and trajectories of teachers."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from stream_r1.commands.console import make_console
from stream_r1.commands.outputs import check_files, check_folder
from stream_r1.disk.lock import folder_lock
from stream_r1.disk.whole import written
from stream_r1.recipe import locate, read_prompts

_CLIPS_PER_PROMPT = 8


def sheet(out: Path, prompts: str, seed: int) -> None:
    """Write frames of a drawing of every prompt as one picture."""
    from stream_r1.demo.stages import drawings
    from stream_r1.sampling.video import contact_sheet

    if out.suffix != ".png":
        raise ValueError(f"--out: expected a path that ends in .png, got {out}")
    check_files("--out", [out], {"--prompts": locate(prompts)})
    texts = read_prompts(prompts)
    picture = contact_sheet(drawings(texts, seed), labels=texts)
    with written(out) as file:
        picture.save(file)
    make_console(lasting=True).print(str(out))


def reference(out: Path, prompts: str) -> None:
    """Write what KID needs to know of drawings of the prompts."""
    from stream_r1.demo.stages import drawings
    from stream_r1.drawn_world import HELD_OUT
    from stream_r1.evaluation import Reference

    console = make_console(lasting=True)
    check_files("--out", [out], {"--prompts": locate(prompts)})
    videos = drawings(read_prompts(prompts) * _CLIPS_PER_PROMPT, HELD_OUT)
    with console.status(f"looking at {len(videos)} drawings"):
        Reference.fit(videos).save(out)
    console.print(f"{out} ({out.stat().st_size / 2**10:.0f} KB, {len(videos)} drawings)", soft_wrap=True)


def ode_pairs(path: Path, overrides: list[str], *, take_over: bool = False) -> None:
    """Write the trajectories of a start's recipe; processes that torchrun started share the files."""
    from stream_r1 import recipe as recipes
    from stream_r1.assembly import write_ode_pairs
    from stream_r1.distill.ranks import join

    recipe = recipes.load_start(path, overrides)
    check_folder("pairs.folder", Path(recipe.pairs.folder), recipe.inputs(path) | {"pairs.folder": None})
    with join(recipe.distributed) as ranks:
        console = make_console(lasting=True, quiet=not ranks.is_main)
        lock = folder_lock(recipe.pairs.folder, take_over=take_over)
        with ranks.held_by_main(lock), console.status("loading the teacher") as status:
            for done in write_ode_pairs(recipe, ranks):
                status.update(f"trajectories: {done} of {recipe.pairs.count}")
            ranks.barrier()
        console.print(f"{recipe.pairs.folder}: {recipe.pairs.count} trajectories", soft_wrap=True)


def baselines(out: Path, recipe: Path) -> None:
    """Measure the teacher's samples and drawings as the demo measures the students, and write the figures."""
    from stream_r1 import recipe as recipes
    from stream_r1.assembly import load_models
    from stream_r1.demo.baselines import measure_baselines, measured_with, save_baselines
    from stream_r1.demo.settings import DemoSettings
    from stream_r1.evaluation import Reference
    from stream_r1.rewards import load_reward

    console = make_console(lasting=True)
    settings = DemoSettings()
    loaded = recipes.load(recipe)
    statistics, judge = locate(settings.reference), locate(settings.judge)
    check_files("--out", [out], loaded.inputs(recipe) | {"reference": statistics, "judge": judge})
    with console.status("sampling the teacher and measuring: some minutes"):
        columns = measure_baselines(
            load_models(loaded), loaded, settings, Reference.load(statistics), load_reward(judge)
        )
    save_baselines(out, columns, measured_with(loaded, settings))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for key in columns["teacher"]:
        figures = (row[key] for row in columns.values())
        table.add_row(key, *(f"{number.value:.3f} ± {number.spread:.3f}" for number in figures))
    console.print(table)
    console.print(str(out), soft_wrap=True)
