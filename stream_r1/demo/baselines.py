"""What the students stand beside in the report's table: the teacher's own samples, and the film.

Both take longer to measure than the demo has, and change only with the assets: they are measured once, by
``stream-r1 data baselines``, and kept as JSON beside the film's statistics.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stream_r1.assembly import Models
from stream_r1.data.film import load_shots, spread_clip_starts
from stream_r1.demo import stages
from stream_r1.demo.settings import DemoSettings
from stream_r1.disk.whole import write_text
from stream_r1.evaluation import Reference
from stream_r1.files import FileError, read_json
from stream_r1.messages import shown
from stream_r1.recipe import Recipe


def measure_baselines(
    models: Models,
    recipe: Recipe,
    settings: DemoSettings,
    reference: Reference,
    film: np.ndarray,
) -> dict[str, dict[str, float]]:
    """Figures by column ("teacher", "film", "film through the autoencoder"), as the students' are made.

    Args:
        models: of the recipe.
        settings: how many videos, and the teacher's solver steps (at least 1).
        reference: what the independent measures compare with.
        film: uint8 [N, H, W, 3], all frames.
    """
    prompts = stages.evaluated_prompts(recipe, settings)
    frames = models.vae.frames(recipe.rollout.frames)
    clips = clips_of_prompts(film, prompts, frames)
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
        decoded = [models.vae.decode(models.vae.encode(clip[None]))[0].clamp(0, 1) for clip in clips]
    columns = {"teacher": teacher, "film": clips, "film through the autoencoder": decoded}
    measured = {name: stages.figures(videos, prompts, models, reference) for name, videos in columns.items()}
    return {
        name: {key: value for key, value in row.items() if not key.endswith("_reference")}
        for name, row in measured.items()
    }


def clips_of_prompts(film: np.ndarray, prompts: list[str], frames: int) -> list[Tensor]:
    """One clip [T, 3, H, W] in [0, 1] of the training shots of each prompt; further ones where it comes
    again.
    """
    starts = {
        prompt: [
            start
            for shot in load_shots()
            if shot.caption == prompt and not shot.held_out
            for start in spread_clip_starts(shot, frames, 4)
        ]
        for prompt in prompts
    }
    missing = [prompt for prompt, found in starts.items() if not found]
    if missing:
        raise ValueError(
            f"clips_of_prompts: prompts: expected captions of training shots, got {missing[0]!r}"
        )
    clips = []
    for prompt in prompts:
        start = starts[prompt].pop(len(starts[prompt]) // 2) if len(starts[prompt]) > 1 else starts[prompt][0]
        clips.append(torch.from_numpy(film[start : start + frames].copy()).movedim(-1, 1).float() / 255)
    return clips


def save_baselines(path: Path, columns: dict[str, dict[str, float]]) -> None:
    """Write the figures, rounded to what they are worth."""
    rounded = {name: {key: round(v, 4) for key, v in row.items()} for name, row in columns.items()}
    write_text(path, json.dumps(rounded, indent=1) + "\n")


def load_baselines(path: Path) -> dict[str, dict[str, float]]:
    """The figures by column; none where the file is not there (other assets, not measured)."""
    columns = read_json(path) if path.exists() else {}
    for name, row in columns.items():
        figures = row.values() if isinstance(row, dict) else [row]
        if not isinstance(row, dict) or not all(type(figure) in (int, float) for figure in figures):
            raise FileError(f"{path}: {shown(name)}: expected figures by name, got {shown(row)}")
    return columns
