"""Makes the videos: streamed into an mp4 chunk by chunk, with a record of how long each part took."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stream_r1.disk.fingerprint import fingerprint
from stream_r1.disk.whole import write_text, written
from stream_r1.evaluation.plan import Evaluation, Video
from stream_r1.files import FileError, read_json
from stream_r1.recipe import locate
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.sampling.video import VideoWriter

MADE = "made"
_TIMES = ("denoise", "cache", "decode", "write")


@dataclass(frozen=True)
class Made:
    """How a video was made.

    asked: what it was made of: model, prompt, noise, length.
    fps: frames a second that it plays at. size: its height and width.
    frames: of each chunk, as written.
    text: seconds for the prompt's embedding. first_frame: from asking to the first chunk's frames.
    denoise, cache, decode, write: seconds of each chunk; `write` is encoding and writing, with the way from
        the device.
    elapsed: seconds spent in the stream up to each chunk's frames, without writing.
    """

    asked: dict[str, Any]
    fps: float
    size: tuple[int, int]
    frames: list[int]
    text: float
    first_frame: float
    denoise: list[float]
    cache: list[float]
    decode: list[float]
    write: list[float]
    elapsed: list[float]

    @property
    def seconds(self) -> float:
        """Its length."""
        return sum(self.frames) / self.fps

    @property
    def borders(self) -> list[int]:
        """Frames that chunks begin with, the first one left out."""
        begins, total = [], 0
        for count in self.frames[:-1]:
            total += count
            begins.append(total)
        return begins


def asked(evaluation: Evaluation, model: str, video: Video, weights: str) -> dict[str, Any]:
    """Everything that a video depends on; `weights` as `weights_mark` gives it."""
    settings = evaluation.settings
    return {
        "model": settings.models[model].model_dump(mode="json"),
        "weights": weights,
        "prompt": video.prompt,
        "index": video.index,
        "seed": settings.seed + video.copy,
        "seconds": settings.seconds,
        "size": None if settings.size is None else list(settings.size),
    }


def weights_mark(evaluation: Evaluation, model: str) -> str:
    """Changes when a model's files do."""
    settings = evaluation.settings.models[model]
    decoder = None if settings.decoder is None else settings.decoder.partition(":")[2]
    names = (settings.folder, settings.checkpoint, settings.adapter, decoder)
    return fingerprint(locate(name) for name in names if name)


def read_made(evaluation: Evaluation, model: str, video: Video, weights: str | None = None) -> Made | None:
    """The record of a video that is there; None if it is not.

    Args:
        weights: refuse a video that was made of others, or of other settings. None: take it as it is.

    Raises:
        FileError: a damaged record, or one of a video that was made otherwise.
    """
    path = evaluation.result(model, MADE, video)
    if not path.is_file() or not evaluation.file(model, video).is_file():
        return None
    made = _parse(path, read_json(path))
    if weights is not None:
        now = asked(evaluation, model, video, weights)
        for key, value in now.items():
            if made.asked.get(key) != value:
                raise FileError(
                    f"{path}: made with {key} other than the recipe's: remove "
                    f"{evaluation.out / model}, or name another folder by out="
                )
    return made


def make_video(
    pipeline: StreamR1Pipeline, evaluation: Evaluation, model: str, video: Video, weights: str
) -> Made:
    """Stream one video into its file; the record beside it appears last."""
    settings = evaluation.settings
    wanted = round(settings.seconds * pipeline.fps)
    stream = pipeline.sampler.stream(
        [video.prompt],
        seed=settings.seed + video.copy,
        chunks=pipeline.chunks(wanted),
        first_index=video.index,
    )
    frames: list[int] = []
    times: dict[str, list[float]] = {name: [] for name in (*_TIMES, "elapsed")}
    target, making = evaluation.file(model, video), evaluation.out / model / "making.mp4"
    with written(making) as place, VideoWriter(place, pipeline.fps) as writer:
        for chunk in stream.ahead():
            shown = chunk.to_uint8()[0][: wanted - sum(frames)]
            began = time.perf_counter()
            writer.write(shown)
            times["write"].append(time.perf_counter() - began)
            frames.append(len(shown))
            for name in ("denoise", "cache", "decode", "elapsed"):
                times[name].append(getattr(chunk.timings, name))
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(making, target)
    made = Made(
        asked(evaluation, model, video, weights),
        float(pipeline.fps),
        pipeline.size,
        frames,
        stream.timings.text,
        stream.timings.first_frame,
        **{name: [round(t, 6) for t in values] for name, values in times.items()},
    )
    write_text(evaluation.result(model, MADE, video), json.dumps(asdict(made)) + "\n")
    return made


def warm_up(pipeline: StreamR1Pipeline, prompt: str) -> None:
    """Two chunks that are thrown away: what happens once (kernels, memory, graphs) is in no video's times."""
    for _ in pipeline.stream([prompt], chunks=2):
        pass


def _parse(path: Path, found: Mapping[str, Any]) -> Made:
    numbers = ("fps", "text", "first_frame")
    lists = ("frames", *_TIMES, "elapsed")
    right = (
        found.keys() == Made.__dataclass_fields__.keys()
        and isinstance(found["asked"], dict)
        and all(_is_number(found[name]) for name in numbers)
        and all(isinstance(found[name], list) and all(map(_is_number, found[name])) for name in lists)
        and isinstance(found["size"], list)
        and len(found["size"]) == 2
        and len({len(found[name]) for name in lists}) == 1
        and found["fps"] > 0
    )
    if not right:
        raise FileError(
            f"{path}: expected the record of a video, got other keys or values: remove it to make it again"
        )
    height, width = found["size"]
    return Made(**{**found, "size": (height, width)})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0
