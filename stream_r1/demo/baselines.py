"""What the students stand beside in the report's table: the teacher's own samples, and drawings.

They change only with the assets: they are measured once, by ``stream-r1 data baselines``, and kept as JSON
beside the reference's statistics.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from stream_r1.assembly import Models
from stream_r1.demo import stages
from stream_r1.demo.record import Number
from stream_r1.demo.settings import DemoSettings
from stream_r1.disk.whole import write_text
from stream_r1.evaluation import Reference, evaluate_videos
from stream_r1.files import FileError, read_text
from stream_r1.messages import shown
from stream_r1.recipe import Recipe
from stream_r1.rewards import Reward

_COLUMNS = TypeAdapter(dict[str, dict[str, tuple[float, float]]])
_SEED = 2_000_000  # of drawings, beyond those that the statistics are of


def measure_baselines(
    models: Models, recipe: Recipe, settings: DemoSettings, reference: Reference, judge: Reward
) -> dict[str, dict[str, Number]]:
    """Figures by column ("teacher", "drawings", "drawings through the autoencoder"), as the students' are
    made.

    Args:
        models: of the recipe.
        settings: how many videos, and the teacher's solver steps (at least 1).
        reference: what KID compares with.
        judge: the reward that judges.
    """
    prompts = stages.evaluated_prompts(recipe, settings)
    drawings = stages.drawings(prompts, _SEED)
    teacher = [
        video
        for start in range(0, len(prompts), settings.evaluated_batch)
        for video in stages.teacher_videos(
            models,
            recipe,
            prompts[start : start + settings.evaluated_batch],
            solver_steps=settings.teacher_steps,
            seed=stages.EVALUATION_SEED + start,
        )
    ]
    with torch.no_grad():
        decoded = [models.vae.decode(models.vae.encode(clip[None]))[0].clamp(0, 1) for clip in drawings]
    columns = {"teacher": teacher, "drawings": drawings, "drawings through the autoencoder": decoded}
    return {
        name: {
            key: Number.of(figure)
            for key, figure in evaluate_videos(videos, prompts, reference, judge).items()
        }
        for name, videos in columns.items()
    }


def save_baselines(path: Path, columns: dict[str, dict[str, Number]]) -> None:
    """Write figures and spreads, rounded to what they are worth."""
    rounded = {
        name: {key: [round(number.value, 4), round(number.spread, 4)] for key, number in row.items()}
        for name, row in columns.items()
    }
    write_text(path, json.dumps(rounded, indent=1) + "\n")


def load_baselines(path: Path) -> dict[str, dict[str, Number]]:
    """The figures by column; none where the file is not there (other assets, not measured)."""
    if not path.exists():
        return {}
    try:
        columns = _COLUMNS.validate_json(read_text(path, "a demo's baselines"), strict=True)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"][:2]))
        raise FileError(f"{path}: {shown(where)}: expected [value, spread] by column and figure") from None
    return {
        name: {key: Number(value=value, spread=spread) for key, (value, spread) in row.items()}
        for name, row in columns.items()
    }
