"""``python -m stream_r1.tiny_world codec|teacher|student|reward``: train a model by a recipe.

``plot`` draws how the autoencoder compares with linear projections, ``chance`` measures what a prompt leaves
open.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from stream_r1.cli import run_app
from stream_r1.config import load_recipe

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Recipe = Annotated[Path, typer.Argument(help="Recipe file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value on top of the recipe.")]


@app.command()
def codec(recipe: Recipe, overrides: Overrides = None) -> None:
    """The autoencoder, from drawings."""
    from stream_r1.tiny_world.codec import CodecSettings, train_codec

    train_codec(load_recipe(CodecSettings, recipe, overrides or []))


@app.command()
def teacher(recipe: Recipe, overrides: Overrides = None) -> None:
    """The bidirectional teacher, from clips and their prompts."""
    from stream_r1.tiny_world.teacher import TeacherSettings, train_teacher

    train_teacher(load_recipe(TeacherSettings, recipe, overrides or []))


@app.command()
def student(recipe: Recipe, overrides: Overrides = None) -> None:
    """The causal student's initialization, from the teacher."""
    from stream_r1.tiny_world.student import StudentSettings, train_student

    train_student(load_recipe(StudentSettings, recipe, overrides or []))


@app.command()
def reward(recipe: Recipe, overrides: Overrides = None) -> None:
    """The reward that guides, or the one that judges, from drawings that are corrupted."""
    from stream_r1.tiny_world.reward import RewardTrainingSettings, train_reward

    train_reward(load_recipe(RewardTrainingSettings, recipe, overrides or []))


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Of the autoencoder.")] = Path("assets/tiny/vae"),
    out: Annotated[Path, typer.Option(help="The SVG to write.")] = Path("out/assets/codec.svg"),
) -> None:
    """The autoencoder's PSNR beside that of linear projections."""
    from stream_r1.tiny_world.codec import plot_against_linear

    for channels, psnr in plot_against_linear(folder, out).items():
        typer.echo(f"linear projection to {channels} numbers: {psnr:.2f} dB")
    typer.echo(str(out))


@app.command()
def chance(
    students: Annotated[list[Path] | None, typer.Argument(help="Folders of students.")] = None,
    recipe: Annotated[Path, typer.Option(help="Of a distillation.")] = Path("recipes/tiny/stream-r1.yaml"),
    prompts: Annotated[int, typer.Option(min=2, help="How many of the recipe's.")] = 20,
    seeds: Annotated[int, typer.Option(min=2, help="Videos of each prompt.")] = 6,
) -> None:
    """How differently videos of one prompt turn out: drawings, the teacher, students."""
    from stream_r1.recipe import load
    from stream_r1.tiny_world.chance import chance_by_model

    found = chance_by_model(load(recipe), students or [], prompts=prompts, seeds=seeds)
    for name, figures in found.items():
        row = ", ".join(f"{key} {figure.value:.2f} ± {figure.spread:.2f}" for key, figure in figures.items())
        typer.echo(f"{name}: {row}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    run_app(app)
