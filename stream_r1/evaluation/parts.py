"""What is found out about single videos, one file of results a video and part."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stream_r1.disk.whole import write_text
from stream_r1.evaluation.drift import drift_curves, reward_match
from stream_r1.evaluation.kid import FrameFeatures
from stream_r1.evaluation.make import Made
from stream_r1.evaluation.plan import EvalSettings, Evaluation, Video
from stream_r1.evaluation.reference import some_frames
from stream_r1.evaluation.single import video_figures
from stream_r1.files import FileError, read_json
from stream_r1.recipe import locate
from stream_r1.rewards import load_reward
from stream_r1.sampling.video_file import VideoFile

Work = Callable[[Path, Made, str], dict[str, Any]]
"""From a video's file, its record and its prompt to what is found out."""

_WHOLE = 10.0  # seconds: longer videos are seen through clips
_CLIP, _CLIPS = 5.0, 4  # seconds of a clip, and how many there are, evenly spread


class Measuring(NamedTuple):
    """One part: the folder of its results, what they depend on, and what loads its models."""

    name: str
    asked: dict[str, Any]
    open: Callable[[], Work]


def measurings(settings: EvalSettings) -> list[Measuring]:
    """The parts of a recipe that look at single videos."""
    found = []
    if "figures" in settings.parts:
        about: dict[str, Any] = {"reference": settings.reference is not None}
        found.append(Measuring("figures", about, lambda: _figures(settings)))
    if "reward" in settings.parts:
        found.append(Measuring("reward", {"reward": settings.reward}, lambda: _reward(settings)))
    if "drift" in settings.parts:
        about = {"window": settings.window_seconds, "reward": settings.reward}
        found.append(Measuring("drift", about, lambda: _drift(settings)))
    if "judge" in settings.parts:
        for name, judge in settings.judges.items():
            asked = judge.model_dump(mode="json")
            found.append(Measuring(f"judge-{name}", asked, partial(_judge, settings, name)))
    return found


def read_result(evaluation: Evaluation, model: str, part: Measuring, video: Video) -> dict[str, Any] | None:
    """What a part found out; None where it has not, or was asked otherwise.

    Raises:
        FileError: a damaged file.
    """
    path = evaluation.result(model, part.name, video)
    if not path.is_file():
        return None
    found = read_json(path)
    if not isinstance(found.get("found"), dict) or not isinstance(found.get("asked"), dict):
        raise FileError(
            f"{path}: expected the results of {part.name}, got other keys: remove it to compute them again"
        )
    found_out: dict[str, Any] = found["found"]
    return found_out if found["asked"] == part.asked else None


def measure(
    evaluation: Evaluation, model: str, part: Measuring, video: Video, made: Made, work: Work
) -> None:
    """Do one part for one video."""
    found = work(evaluation.file(model, video), made, video.prompt)
    content = {"asked": part.asked, "found": _without_nan(found)}
    write_text(evaluation.result(model, part.name, video), json.dumps(content) + "\n")


def clips(path: Path, made: Made) -> Iterator[Tensor]:
    """A whole video of up to 10 s; of a longer one four clips of 5 s, evenly spread. [T, 3, H, W] each."""
    with VideoFile(path) as file:
        total = sum(made.frames)
        if made.seconds <= _WHOLE:
            yield torch.cat(list(file.pieces(max(total, 1))))
            return
        length = round(_CLIP * made.fps)
        wanted = [round(n * (total - length) / (_CLIPS - 1)) for n in range(_CLIPS)]
        at, held = 0, torch.empty(0)
        for piece in file.pieces(length):
            held = torch.cat([held[-length:], piece]) if len(held) else piece
            at += len(piece)
            while wanted and at >= wanted[0] + length:
                begin = len(held) - (at - wanted.pop(0))
                yield held[begin : begin + length]


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: float(np.mean([row[name] for row in rows])) for name in rows[0] if all(name in r for r in rows)
    }


def _figures(settings: EvalSettings) -> Work:
    features = None if settings.reference is None else FrameFeatures()

    def work(path: Path, made: Made, prompt: str) -> dict[str, Any]:
        rows, seen = [], []
        for clip in clips(path, made):
            rows.append(video_figures(clip, prompt))
            if features is not None:
                seen.append(features(some_frames(clip, 4)))
        kept = torch.cat(seen)[:: len(seen)] if seen else torch.empty(0)  # four frames of a video
        return {"figures": _mean(rows), "features": [[round(x, 5) for x in row] for row in kept.tolist()]}

    return work


def _reward(settings: EvalSettings) -> Work:
    assert settings.reward is not None
    reward = load_reward(locate(settings.reward), device=_fastest())

    @torch.no_grad()
    def work(path: Path, made: Made, prompt: str) -> dict[str, Any]:
        scores = [reward.score(clip[None].to(_fastest()), [prompt])[0].tolist() for clip in clips(path, made)]
        return {"axes": _mean([dict(zip(reward.axes, row, strict=True)) for row in scores])}

    return work


def _drift(settings: EvalSettings) -> Work:
    match = None
    if settings.reward is not None:
        match = reward_match(load_reward(locate(settings.reward), device=_fastest()))

    def work(path: Path, made: Made, prompt: str) -> dict[str, Any]:
        window = settings.window_seconds
        return {"curves": drift_curves(path, made.borders, prompt, window=window, match=match)}

    return work


def _judge(settings: EvalSettings, name: str) -> Work:
    from stream_r1.evaluation.judge import Judge  # here: transformers' models take a second to import

    judge = Judge.from_folder(settings.judges[name])

    def work(path: Path, made: Made, prompt: str) -> dict[str, Any]:
        ratings = judge.rate(path, prompt, frames=sum(made.frames), fps=made.fps)
        return {"ratings": {axis: rating._asdict() for axis, rating in ratings.items()}}

    return work


def _fastest() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _without_nan(value: Any) -> Any:
    """JSON has no nan: null stands for it."""
    if isinstance(value, dict):
        return {key: _without_nan(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_without_nan(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
