"""``python -m stream_r1.study.measure STUDY ARM SEED``: judge one trained student, in its own process."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stream_r1.assembly import load_models
from stream_r1.cli import run_app
from stream_r1.demo.stages import make_sampler, stream_batches
from stream_r1.disk.whole import write_text, written
from stream_r1.evaluation import Reference
from stream_r1.evaluation.kid import FrameFeatures, kernel_distance
from stream_r1.evaluation.reference import some_frames
from stream_r1.evaluation.single import video_figures
from stream_r1.models.checkpoints import load_student
from stream_r1.recipe import Recipe, locate, read_prompts
from stream_r1.rewards import load_reward
from stream_r1.sampling.video import VideoWriter
from stream_r1.study.plan import Study, load

FIGURES = "figures.json"
VIDEOS = "videos"
FIRST_SEED = 20_000  # of the noise of judged videos, which no demo shows


def measure(study: Study, recipe: Recipe, student: Path, folder: Path) -> None:
    """Judge the student in `student`; write ``figures.json`` and the shown videos into `folder`.

    figures.json: {figure: [a number a video]}; a figure of all videos together has one number.
    """
    models = load_models(recipe)
    models.student = load_student(student).eval()
    prompts = list(itertools.islice(itertools.cycle(read_prompts(recipe.prompts)), study.settings.videos))
    sampler, batch = make_sampler(models.student, models, recipe), study.settings.batch
    videos = stream_batches(sampler, recipe, prompts, seed=FIRST_SEED, batch=batch)
    figures = judged(study, videos, prompts)
    shown = study.settings.shown
    if shown:
        for index, video in enumerate(stream_batches(sampler, recipe, shown, seed=0, batch=batch)):
            path = folder / VIDEOS / f"{index}.mp4"
            with written(path) as place, VideoWriter(place, fps=recipe.watch.fps) as writer:
                writer.write(video)
    write_text(folder / FIGURES, json.dumps(figures) + "\n")


@torch.no_grad()
def judged(study: Study, videos: Sequence[Tensor], prompts: Sequence[str]) -> dict[str, list[float]]:
    """Figures by name, a number a video; those of the whole set have one number."""
    rows = [video_figures(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
    common = [name for name in rows[0] if all(name in row for row in rows)]
    figures = {name: [row[name] for row in rows] for name in common}
    if study.settings.judge is not None:
        judge = load_reward(locate(study.settings.judge))
        scores = torch.cat(
            [judge.score(video[None], [prompt]) for video, prompt in zip(videos, prompts, strict=True)]
        )
        figures |= {f"judge/{axis}": scores[:, i].tolist() for i, axis in enumerate(judge.axes)}
    if study.settings.reference is not None:
        reference = Reference.load(locate(study.settings.reference))
        features = FrameFeatures()(torch.cat([some_frames(video, 4) for video in videos]))
        figures["kid"] = [kernel_distance(features, reference.features)]
    return figures


def main(path: Path, arm: str, seed: int, overrides: list[str] | None = None) -> None:
    """Judge the student of one run."""
    study = load(path, overrides or [])
    run = next(run for run in study.runs if (run.arm, run.seed) == (arm, seed))
    measure(study, run.recipe, run.folder / "student", run.folder)


if __name__ == "__main__":
    run_app(main)
