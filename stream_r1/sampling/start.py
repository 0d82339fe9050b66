"""What a stream starts from: the end of a video, or a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from stream_r1.sampling.footage import MAX_PIXELS, Footage
from stream_r1.sampling.pictures import check_size, picture_kind, read_image, read_moving
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.sampling.video_file import VideoFile


@dataclass(frozen=True)
class Start:
    """Frames for `first_frames`, [1, T, 3, H, W], and in words where they are from."""

    frames: Tensor
    meaning: str


def read_start(
    path: str | Path, pipeline: StreamR1Pipeline, *, max_pixels: int = MAX_PIXELS, fit: bool = False
) -> Start:
    """First frames for a pipeline, from a file, as players and viewers show it.

    Of a video or a moving picture its last frames at the stream's frames a second, as many as fill whole
    chunks of the student's window; nothing before them is kept. A picture is the first frame of a student
    with an independent first frame; others start with a whole chunk, for which it stands still.

    Args:
        path: see `read_video` and `read_image`.
        pipeline: whose size, frame rate and window count.
        max_pixels: of all frames together; more are refused.
        fit: take files of any size: their middle at the pipeline's aspect, scaled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video or a picture, another size than the pipeline's (without `fit`), too few
            frames, or what can't be shown as the file says; see `VideoFile` and `read_image`.
    """
    path = Path(path)
    config, frames = pipeline.student.config, pipeline.vae.frames
    each, count = config["frames_per_chunk"], config["first_chunk_frames"] or config["frames_per_chunk"]
    kind = picture_kind(path)
    if kind == "still":
        still = read_image(path, size=None if fit else pipeline.size, max_pixels=max_pixels)
        still = _fitted(still[None], pipeline.size)
        needed = frames(count)
        meaning = "a picture as the first frame" if needed == 1 else f"a picture, still for {needed} frames"
        return Start(still.expand(1, needed, -1, -1, -1), meaning)
    limit = config["window_frames"]
    last = None if limit is None else frames(count + max(0, limit - count) // each * each)
    footage = _footage(path, kind == "moving", pipeline, last, max_pixels, None if fit else pipeline.size)
    got = len(footage.frames)
    while (limit is None or count + each <= limit) and frames(count + each) <= got:
        count += each
    if frames(count) > got:
        raise ValueError(
            f"{path}: expected at least {frames(count)} frames at {pipeline.fps:g} a second to start from, "
            f"got {got}" + _damage(footage)
        )
    return Start(
        _fitted(footage.frames[-frames(count) :], pipeline.size)[None],
        f"the last {frames(count)} of {footage.total} frames{_damage(footage)}",
    )


def _fitted(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of frames [T, 3, H, W] at the aspect of `size` (height, width), scaled to it."""
    height, width = frames.shape[-2:]
    if (height, width) == size:
        return frames
    scale = max(size[0] / height, size[1] / width)
    rows, columns = (
        max(1, min(full, round(part / scale))) for full, part in ((height, size[0]), (width, size[1]))
    )
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = frames[:, :, top : top + rows, left : left + columns]
    return functional.interpolate(middle, size, mode="bicubic", antialias=True).clamp(0, 1)


def _footage(
    path: Path,
    moving: bool,
    pipeline: StreamR1Pipeline,
    last: int | None,
    max_pixels: int,
    size: tuple[int, int] | None,
) -> Footage:
    if moving:
        return read_moving(path, pipeline.fps, last=last, size=size, max_pixels=max_pixels)
    with VideoFile(path, max_pixels=max_pixels) as file:
        if size is not None:
            check_size(file.size, size, str(path))
        return file.read(pipeline.fps, last=last)


def _damage(footage: Footage) -> str:
    return f", as far as the damaged file can be read ({footage.damage})" if footage.damage else ""
