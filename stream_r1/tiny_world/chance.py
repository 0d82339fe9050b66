"""What is left to chance, given a prompt: how differently videos of other seeds turn out, beside drawings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stream_r1.assembly import load_models
from stream_r1.demo.stages import drawings, make_sampler, stream_batches, teacher_videos
from stream_r1.drawn_world import HELD_OUT
from stream_r1.drawn_world.measures import spread
from stream_r1.evaluation.spread import Figure
from stream_r1.models.checkpoints import load_student
from stream_r1.recipe import Recipe, locate, read_prompts

FIGURES = {
    "place": "deviation of the thing's first places around their mean, in pixels",
    "picture": "root mean square difference of two videos' first frames, of 255",
}
_SEED = 30_000
Maker = Callable[[list[str], int], list[Tensor]]
"""Videos of prompts by a seed, [T, 3, H, W] in [0, 1] each."""


def chance_by_model(
    recipe: Recipe, students: Sequence[Path], *, prompts: int = 20, seeds: int = 6, solver_steps: int = 24
) -> dict[str, dict[str, Figure]]:
    """The `FIGURES` of drawings, of the recipe's teacher, and of each student's streams: means over prompts.

    Args:
        recipe: of a distillation; its prompts, rollout, guidance and steps are used.
        students: folders.
        prompts: how many of the recipe's, from the first on; at least 2.
        seeds: videos of each prompt; at least 2.
        solver_steps: of the teacher.
    """
    texts = read_prompts(recipe.prompts)[:prompts]
    models = load_models(recipe)

    def by_teacher(some: list[str], seed: int) -> list[Tensor]:
        return teacher_videos(models, recipe, some, solver_steps=solver_steps, seed=seed)

    def by_student(folder: Path) -> Maker:
        sampler = make_sampler(load_student(locate(folder)).eval(), models, recipe)
        return lambda some, seed: stream_batches(sampler, recipe, some, seed=seed, batch=len(some))

    makers: dict[str, Maker] = {
        "drawings": lambda some, seed: drawings(some, HELD_OUT + seed),
        "teacher": by_teacher,
    } | {str(folder): by_student(folder) for folder in students}
    found = {}
    for name, make in makers.items():
        rows = []
        for index, text in enumerate(texts):
            rows.append(_figures(make([text] * seeds, _SEED + index * seeds)))
        found[name] = {
            key: Figure.mean([row[key] for row in rows if math.isfinite(row[key])]) for key in FIGURES
        }
    return found


def _figures(videos: list[Tensor]) -> dict[str, float]:
    first = torch.stack([video[0].float() for video in videos]).flatten(1)  # [seeds, pixels]
    variance = first.var(0).mean()  # half of the mean squared difference of two of them
    return {"place": spread(videos), "picture": float(255 * (2 * variance) ** 0.5)}
