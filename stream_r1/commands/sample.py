"""``stream-r1 sample``: a stream into mp4 files, frame by frame."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from stream_r1.recipe import locate
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.sampling.sampler import Stream
from stream_r1.sampling.video import VideoWriter, contact_sheet, read_video

_SHEET_FRAMES = 240  # kept in memory for the contact sheet, however long the stream


@dataclass(frozen=True)
class Output:
    """Where a stream goes, and how large."""

    path: Path
    scale: int = 1
    sheet: bool = False

    def files(self, count: int) -> list[Path]:
        """One mp4 a prompt."""
        if self.path.suffix != ".mp4":
            raise ValueError(f"--out: expected a path that ends in .mp4, got {self.path}")
        if count == 1:
            return [self.path]
        return [self.path.with_stem(f"{self.path.stem}-{index}") for index in range(count)]


def run(
    prompts: list[str],
    output: Output,
    *,
    models: str,
    checkpoint: Path | None,
    preset: str | None,
    size: str | None,
    seconds: float | None,
    seed: int,
    start: Path | None,
) -> None:
    """Stream `seconds` (None: until Ctrl-C) of every prompt, and say how fast it was."""
    console = Console()
    files = output.files(len(prompts))
    wanted = None if size is None else _size(size)
    with console.status("loading the models"):
        pipeline = StreamR1Pipeline.from_pretrained(locate(models), checkpoint, preset, size=wanted)
    chunks = None if seconds is None else _chunks(pipeline, seconds, start is not None)
    given = None if start is None else _start(pipeline, start)
    stream = pipeline.stream(prompts, seed, chunks, first_frames=given)
    stopped = False
    frames: list[Tensor] = []
    with ExitStack() as stack:
        writers = [stack.enter_context(VideoWriter(file, pipeline.fps, scale=output.scale)) for file in files]
        status = stack.enter_context(console.status("streaming; Ctrl-C ends it"))
        try:
            _write(stream, pipeline.fps, writers, frames, status.update)
        except KeyboardInterrupt:
            stopped = True
    timings = stream.timings
    for file in files:
        console.print(str(file), soft_wrap=True, highlight=False)
    if output.sheet and frames:
        picture = output.path.with_suffix(".png")
        contact_sheet(list(torch.cat(frames, 1)), labels=prompts, scale=2, enlarge="bicubic").save(picture)
        console.print(str(picture), soft_wrap=True, highlight=False)
    console.print(
        f"{timings.frames / pipeline.fps:.1f} s of video, {timings.fps:.1f} frames a second, "
        f"first frame after {1000 * timings.first_frame:.0f} ms",
        highlight=False,
    )
    if stopped and seconds is not None:
        sys.exit(130)


def _write(
    stream: Stream,
    fps: float,
    writers: list[VideoWriter],
    frames: list[Tensor],
    tell: Callable[[str], object],
) -> None:
    kept = 0
    for chunk in stream:
        assert chunk.frames is not None  # the sampler has a VAE
        for writer, video in zip(writers, chunk.frames, strict=True):
            writer.write(video)
        if kept < _SHEET_FRAMES:
            frames.append(chunk.frames)
            kept += chunk.frames.shape[1]
        tell(
            f"{stream.timings.frames / fps:.1f} s at {stream.timings.fps:.1f} frames a second; Ctrl-C ends it"
        )


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise ValueError(f"--size: expected height x width as 64x112, got {text!r}")
    return int(found[1]), int(found[2])


def _chunks(pipeline: StreamR1Pipeline, seconds: float, goes_on: bool) -> int:
    """Chunks that hold `seconds`; the first one of a video is shorter, for the decoder is causal."""
    config, vae = pipeline.student.config, pipeline.vae
    each = config["frames_per_chunk"] * vae.temporal_factor
    first = each if goes_on else vae.frames(config["first_chunk_frames"] or config["frames_per_chunk"])
    return 1 + max(0, math.ceil((round(seconds * pipeline.fps) - first) / each))


def _start(pipeline: StreamR1Pipeline, path: Path) -> Tensor:
    """The end of a video, as many frames as whole chunks of the student's window have: [1, T, 3, H, W]."""
    video, _ = read_video(path)
    if tuple(video.shape[-2:]) != pipeline.size:
        expected, got = (f"{height}x{width}" for height, width in (pipeline.size, video.shape[-2:]))
        raise ValueError(f"--start: expected a video of {expected} (see --size), got {got}")
    config, vae = pipeline.student.config, pipeline.vae
    count = config["first_chunk_frames"] or config["frames_per_chunk"]
    limit = config["window_frames"] or math.inf
    more = config["frames_per_chunk"]
    while count + more <= limit and vae.frames(count + more) <= len(video):
        count += more
    if vae.frames(count) > len(video):
        raise ValueError(f"--start: expected at least {vae.frames(count)} frames, got {len(video)}")
    return video[-vae.frames(count) :][None]
