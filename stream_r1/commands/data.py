"""``stream-r1 data``: the film behind the tiny world."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from stream_r1.commands.console import make_console
from stream_r1.commands.outputs import check_files, check_folder
from stream_r1.data import film
from stream_r1.disk.lock import folder_lock
from stream_r1.disk.whole import written
from stream_r1.recipe import locate, read_prompts

_CLIP_FRAMES = 33
_CLIPS_PER_SHOT = 4


def fetch(cache: Path | None) -> None:
    """Fetch the film into ``cache`` (default: the user's cache folder) and say where it is."""
    console = make_console(lasting=True)
    with console.status("fetching the film"):
        path = film.fetch_film(cache)
    console.print(f"{path} ({path.stat().st_size / 2**20:.0f} MB)", soft_wrap=True)
    console.print("Big Buck Bunny, (c) Blender Foundation, CC-BY 3.0, www.bigbuckbunny.org", style="dim")


def shots() -> None:
    """Print the captioned shots; needs no film."""
    table = Table(box=None, pad_edge=False)
    table.add_column("shot", justify="right")
    table.add_column("start", justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("held out")
    table.add_column("caption")
    for shot in film.load_shots():
        start, length = shot.start / film.FPS, shot.frames / film.FPS
        held_out = "yes" if shot.held_out else ""
        table.add_row(str(shot.index), f"{start:.1f}", f"{length:.1f}", held_out, shot.caption)
    make_console().print(table)


def sheet(out: Path, cache: Path | None) -> None:
    """Write the middle frame of every shot, captioned, as one picture."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    if out.suffix != ".png":
        raise ValueError(f"--out: expected a path that ends in .png, got {out}")
    check_files("--out", [out], {"--cache": cache or film.default_cache()})
    console = make_console(lasting=True)
    with console.status("reading the film"):
        frames = film.load_film(cache)
    listed = film.load_shots()
    columns = 6
    rows = -(-len(listed) // columns)
    figure: Figure = plt.figure(figsize=(2.4 * columns, 1.75 * rows), dpi=100, layout="constrained")
    for place, shot in enumerate(listed):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(frames[(shot.start + shot.end) // 2])
        axes.set_title(f"{shot.index}  {shot.caption}", fontsize=6, wrap=True, loc="left")
        axes.axis("off")
    with written(out) as file:
        figure.savefig(file)
    plt.close(figure)
    console.print(str(out))


def reference(out: Path, prompts: str, cache: Path | None) -> None:
    """Fit and write what the measures need to know of the film's own shots with these captions."""
    import torch

    from stream_r1.evaluation import Reference

    console = make_console(lasting=True)
    captions = read_prompts(prompts)
    check_files("--out", [out], {"--prompts": locate(prompts), "--cache": cache or film.default_cache()})
    with console.status("reading the film"):
        frames = film.load_film(cache)
    videos, owners = [], []
    for shot in film.load_shots():
        if shot.held_out or shot.caption not in captions:
            continue
        for start in film.spread_clip_starts(shot, _CLIP_FRAMES, _CLIPS_PER_SHOT):
            clip = torch.from_numpy(frames[start : start + _CLIP_FRAMES].copy())
            videos.append(clip.movedim(-1, 1).float() / 255)  # [T, 3, H, W]
            owners.append(shot.caption)
    if not videos:
        raise ValueError(f"{prompts}: no caption of a training shot of the film")
    with console.status(f"measuring {len(videos)} clips"):
        Reference.fit(videos, owners).save(out)
    console.print(f"{out} ({out.stat().st_size / 2**10:.0f} KB, {len(videos)} clips)", soft_wrap=True)


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


def baselines(out: Path, recipe: Path, cache: Path | None) -> None:
    """Measure the teacher's samples and the film as the demo measures the students, and write the figures."""
    from stream_r1 import recipe as recipes
    from stream_r1.assembly import load_models
    from stream_r1.demo.baselines import measure_baselines, save_baselines
    from stream_r1.demo.settings import DemoSettings
    from stream_r1.evaluation import Reference

    console = make_console(lasting=True)
    settings = DemoSettings()
    loaded = recipes.load(recipe)
    reads = loaded.inputs(recipe) | {"reference": recipes.locate(settings.reference)}
    check_files("--out", [out], reads | {"--cache": cache or film.default_cache()})
    statistics = Reference.load(recipes.locate(settings.reference))
    with console.status("reading the film"):
        frames = film.load_film(cache)
    with console.status("sampling the teacher and measuring: some minutes"):
        columns = measure_baselines(load_models(loaded), loaded, settings, statistics, frames)
    save_baselines(out, columns)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for key in columns["teacher"]:
        table.add_row(key, *(f"{row[key]:.3f}" for row in columns.values()))
    console.print(table)
    console.print(str(out), soft_wrap=True)
