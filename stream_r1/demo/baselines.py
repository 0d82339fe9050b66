"""What the students stand beside in the report's table: the teacher's own samples, and drawings.

They change only with the assets: they are measured once, by ``stream-r1 data baselines``, and kept as JSON
beside the reference's statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from stream_r1.assembly import Models
from stream_r1.config import Settings
from stream_r1.demo import stages
from stream_r1.demo.record import Number
from stream_r1.demo.settings import DemoSettings
from stream_r1.disk.fingerprint import fingerprint
from stream_r1.disk.whole import write_text
from stream_r1.evaluation import Reference, evaluate_videos
from stream_r1.files import FileError, read_text
from stream_r1.messages import shown
from stream_r1.recipe import Recipe, locate
from stream_r1.rewards import Reward

_SEED = 2_000_000  # of drawings, beyond those that the statistics are of


class OtherBaselinesError(ValueError):
    """Figures that can not stand beside a demo's."""


class _Kept(Settings):
    """The file.

    measured_with: what the figures depend on.
    figures: value and spread, by column and figure.
    """

    measured_with: dict[str, Any]
    figures: dict[str, dict[str, tuple[float, float]]]


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


def measured_with(recipe: Recipe, settings: DemoSettings) -> dict[str, Any]:
    """What the figures depend on, besides how many videos they are means over."""
    models, shape = recipe.models, recipe.rollout
    return {
        "teacher": fingerprint([locate(models.teacher)]),
        "vae": fingerprint([locate(models.vae)]),
        "judge": fingerprint([locate(settings.judge)]),
        "reference": fingerprint([locate(settings.reference)]),
        "guidance_scale": recipe.matching.guidance_scale,
        "teacher_steps": settings.teacher_steps,
        "frames": [shape.frames, shape.height, shape.width],
    }


def save_baselines(path: Path, columns: dict[str, dict[str, Number]], made_with: Mapping[str, Any]) -> None:
    """Write figures and spreads, rounded to what they are worth, and what they depend on."""
    rounded = {
        name: {key: (round(number.value, 4), round(number.spread, 4)) for key, number in row.items()}
        for name, row in columns.items()
    }
    kept = _Kept(measured_with=dict(made_with), figures=rounded)
    write_text(path, kept.model_dump_json(indent=1) + "\n")


def load_baselines(path: Path, expected: Mapping[str, Any]) -> dict[str, dict[str, Number]]:
    """The figures by column.

    Raises:
        FileError: a file of something else.
        OtherBaselinesError: none are there, or they depend on something other than what is expected; without
            the teacher's samples (``teacher_steps`` 0) how long its figures were sampled is any.
    """
    if not path.exists():
        raise OtherBaselinesError(f"{path}: no such file")
    try:
        kept = _Kept.model_validate_json(read_text(path, "a demo's baselines"), strict=True)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"][:3]))
        raise FileError(
            f"{path}: {shown(where)}: expected measured_with and, by column and figure, [value, spread]"
        ) from None
    asked = {key: value for key, value in expected.items() if (key, value) != ("teacher_steps", 0)}
    for key, value in asked.items():
        if kept.measured_with.get(key) != value:
            was = shown(kept.measured_with.get(key))
            raise OtherBaselinesError(f"{path}: measured with {key} {was}, here it is {shown(value)}")
    return {
        name: {key: Number(value=value, spread=spread) for key, (value, spread) in row.items()}
        for name, row in kept.figures.items()
    }
