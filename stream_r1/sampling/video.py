"""Videos as files: an mp4 that grows with the stream, reading one back, contact sheets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from stream_r1.pixels import check_range, to_uint8
from stream_r1.sampling.footage import MAX_PIXELS
from stream_r1.sampling.pictures import picture_kind, read_image, read_moving
from stream_r1.sampling.video_file import VideoFile

__all__ = ["VideoWriter", "contact_sheet", "read_image", "read_video"]

# Fragments instead of one index at the end: whatever is on disk plays, also if the process was stopped.
MAX_SIDE = 16384  # of an encoded picture
_FRAGMENTED = "frag_keyframe+empty_moov+default_base_moof"

Enlargement = Literal["nearest", "bicubic"]


class VideoWriter:
    """Writes an H.264 mp4 frame by frame; the file plays at any moment, up to its last whole fragment.

    A fragment is half a second. Colours are BT.709 of limited range, and the file says so. H.264 (4:2:0)
    wants even sizes: where the picture's are odd, its last row or column is repeated once. A context manager;
    `close` writes what the encoder still holds.

    Args:
        path: the file; its folder is made.
        fps: frames a second.
        scale: enlarges pictures by a whole factor, for small videos.
        enlarge: how: "nearest" keeps pixels visible, "bicubic" smooths.
        crf: H.264's constant rate factor, 0 (lossless) to 51; 16 is hard to tell from the original.

    Raises:
        ValueError: settings out of range, a path that is not an mp4.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float = 24,
        *,
        scale: int = 1,
        enlarge: Enlargement = "nearest",
        crf: int = 16,
    ) -> None:
        path = Path(path)
        if path.suffix != ".mp4":
            raise ValueError(f"VideoWriter: path must end in .mp4, got {path}")
        if not fps > 0:
            raise ValueError(f"VideoWriter: fps must be positive, got {fps}")
        if not 0 <= crf <= 51:
            raise ValueError(f"VideoWriter: crf must be in [0, 51], got {crf}")
        _check_enlargement("VideoWriter", scale, enlarge)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.fps = Fraction(fps).limit_denominator(1001)
        self.frames = 0
        self._scale, self._enlarge, self._crf = scale, enlarge, crf
        self._size: tuple[int, int] | None = None  # of the frames given, before enlargement
        self._stream: av.VideoStream | None = None
        self._container = av.open(
            str(path), "w", format="mp4", options={"movflags": _FRAGMENTED, "flush_packets": "1"}
        )

    def write(self, frames: Tensor) -> None:
        """Append frames [T, 3, H, W], floating point in [0, 1] (clamped) or uint8; all calls of one size.

        Raises:
            ValueError: another shape or size, or the writer is closed.
            TypeError: another dtype.
        """
        if self._container is None:
            raise ValueError(f"VideoWriter.write: {self.path} is closed")
        _check_frames("VideoWriter.write", frames)
        height, width = frames.shape[-2:]
        if self._size not in (None, (height, width)):
            expected = f"{self._size[0]} x {self._size[1]}"
            raise ValueError(
                f"VideoWriter.write: frames must be {expected} as before, got {height} x {width}"
            )
        check_side("VideoWriter.write", height, width, self._scale)
        self._size = (height, width)
        pixels = _enlarge(to_uint8(frames).cpu(), self._scale, self._enlarge)
        pixels = functional.pad(
            pixels.float(), (0, pixels.shape[-1] % 2, 0, pixels.shape[-2] % 2), mode="replicate"
        ).to(torch.uint8)
        if self._stream is None:
            self._stream = self._open_stream(pixels.shape[-2], pixels.shape[-1])
        for picture in pixels.permute(0, 2, 3, 1).contiguous().numpy():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p",
                interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
                src_color_range=ColorRange.JPEG,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                dst_color_primaries=ColorPrimaries.BT709,
                dst_color_trc=ColorTrc.BT709,
            )
            frame.pts = self.frames
            frame.time_base = 1 / self.fps
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def close(self) -> None:
        """Write what the encoder still holds and close the file. Twice is fine."""
        if self._container is None:
            return
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        self._container = None  # type: ignore[assignment]

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_stream(self, height: int, width: int) -> av.VideoStream:
        # zerolatency: no frame waits in the encoder for later ones
        options = {"crf": str(self._crf), "preset": "veryfast", "tune": "zerolatency"}
        stream = self._container.add_stream("libx264", rate=self.fps, options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = 1 / self.fps
        # stated in the file, and what `write` converts by: else players guess, by the picture's size
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.gop_size = max(1, round(self.fps / 2))
        return stream


def read_video(
    path: str | Path,
    max_frames: int | None = None,
    *,
    fps: float | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Tensor, float]:
    """The frames of a video file or a moving picture as a player shows them, see `VideoFile`.

    Args:
        path: anything PyAV reads, or a GIF, PNG, WebP or AVIF that moves.
        max_frames: stop after so many; None: all.
        fps: frames a second that are wanted: frames are dropped or repeated by their time stamps; None: the
            file's own mean rate.
        max_pixels: of all frames together; more are refused.

    Returns:
        (video [T, 3, H, W] float32 in [0, 1], frames a second). A damaged file is read as far as it goes,
        with a RuntimeWarning.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video, one without a single frame, more pixels than asked for, or one that says
            of itself what can't be honoured; see `VideoFile`.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"read_video: max_frames must be at least 1 or None, got {max_frames}")
    if fps is not None and not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"read_video: fps must be positive, got {fps}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"read_video: no such file: {path}")
    if picture_kind(path) == "moving":
        footage = read_moving(path, fps, first=max_frames, max_pixels=max_pixels)
    else:
        with VideoFile(path, max_pixels=max_pixels) as file:
            footage = file.read(fps, first=max_frames)
    if footage.damage:
        count = len(footage.frames)
        told = f"read_video: {path} was read as far as it goes, {count} frames: {footage.damage}"
        warnings.warn(told, RuntimeWarning, stacklevel=2)
    return footage.frames, footage.fps


def contact_sheet(
    videos: Tensor | Sequence[Tensor],
    columns: int = 8,
    *,
    labels: Sequence[str] | None = None,
    scale: int = 1,
    enlarge: Enlargement = "nearest",
    gap: int = 4,
) -> Image.Image:
    """A picture of videos: one row each, frames evenly spaced from the first to the last.

    Args:
        videos: [B, T, 3, H, W] or a sequence of [T, 3, H, W] (T may differ), floating point in
            [0, 1] or uint8.
        columns: frames a row; a shorter video shows all it has.
        labels: a line of text above each row.
        scale, enlarge: as for `VideoWriter`.
        gap: pixels between pictures.

    Raises:
        ValueError, TypeError: videos of other shapes or dtypes, or not all of one size.
    """
    rows = list(videos)
    if not rows or columns < 1:
        raise ValueError(f"contact_sheet: expected videos and columns >= 1, got {len(rows)} and {columns}")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"contact_sheet: labels must be {len(rows)}, one a video, got {len(labels)}")
    _check_enlargement("contact_sheet", scale, enlarge)
    for video in rows:
        _check_frames("contact_sheet", video)
        if video.shape[-2:] != rows[0].shape[-2:] or not len(video):
            expected = f"frames of one size, {list(rows[0].shape[-2:])}"
            raise ValueError(f"contact_sheet: videos must have {expected}, got {list(video.shape)}")
    shown = [
        video[np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)] for video in rows
    ]
    check_side("contact_sheet", rows[0].shape[-2], rows[0].shape[-1], scale)
    height, width = (scale * size for size in rows[0].shape[-2:])
    head = 14 if labels is not None else 0
    across = max(len(frames) for frames in shown)
    if across * width * len(rows) * height > MAX_PIXELS:
        expected = f"columns, scale and videos for at most {MAX_PIXELS} pixels"
        raise ValueError(
            f"contact_sheet: expected {expected}, got {across} x {len(rows)} pictures of {height} x {width}"
        )
    sheet = Image.new(
        "RGB", (gap + across * (width + gap), gap + len(rows) * (head + height + gap)), (24, 24, 24)
    )
    draw = ImageDraw.Draw(sheet)
    for row, frames in enumerate(shown):
        top = gap + row * (head + height + gap)
        if labels is not None:
            draw.text((gap, top), labels[row], fill=(230, 230, 230))
        for column, picture in enumerate(
            _enlarge(to_uint8(frames).cpu(), scale, enlarge).permute(0, 2, 3, 1)
        ):
            sheet.paste(Image.fromarray(picture.numpy()), (gap + column * (width + gap), top + head))
    return sheet


def check_side(caller: str, height: int, width: int, scale: int) -> None:
    """Refuses what H.264 has no room for, before memory is taken for it."""
    if max(height, width) * scale > MAX_SIDE:
        raise ValueError(
            f"{caller}: scale: expected sides up to {MAX_SIDE} pixels, got {height} x {width} times {scale}"
        )


def _enlarge(pixels: Tensor, scale: int, how: Enlargement) -> Tensor:
    """uint8 [T, 3, H, W] -> [T, 3, scale H, scale W]."""
    if scale == 1:
        return pixels
    if how == "nearest":
        return pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    smooth = functional.interpolate(pixels.float(), scale_factor=float(scale), mode="bicubic")
    return smooth.round().clamp(0, 255).to(torch.uint8)


def _check_frames(caller: str, frames: Tensor) -> None:
    if frames.dim() != 4 or frames.shape[1] != 3 or 0 in frames.shape[2:]:
        raise ValueError(f"{caller}: frames must be [T, 3, H, W], got {list(frames.shape)}")
    if not frames.is_floating_point() and frames.dtype != torch.uint8:
        raise TypeError(f"{caller}: frames must be floating point in [0, 1] or uint8, got {frames.dtype}")
    check_range(frames, f"{caller}: frames", finite=True)


def _check_enlargement(caller: str, scale: int, how: str) -> None:
    if scale < 1 or int(scale) != scale:
        raise ValueError(f"{caller}: scale must be a whole number from 1, got {scale}")
    if how not in ("nearest", "bicubic"):
        raise ValueError(f"{caller}: enlarge must be 'nearest' or 'bicubic', got {how!r}")
