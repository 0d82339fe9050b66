"""Small pictures and videos, and what a start is read for."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]
COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 220]], np.uint8)
CORNERS = COLOURS.reshape(2, 2, 3).repeat(16, 0).repeat(24, 1)  # [32, 48, 3]: four colours, none like another


def greys(count: int, step: int = 10) -> list[Pixels]:
    return [np.full((32, 48, 3), step * index, np.uint8) for index in range(count)]


def bytes_of(video: Tensor) -> NDArray[np.int64]:
    return (video.movedim(-3, -1) * 255).round().long().numpy()


def steps_of(video: Tensor, step: int = 10) -> list[int]:
    """Which of `greys` each frame is."""
    return (video.mean((1, 2, 3)) * 255 / step).round().long().tolist()


def write(
    path: Path,
    pictures: Sequence[Pixels],
    *,
    rate: Fraction | int = 24,
    codec: str = "libx264",
    pix_fmt: str = "yuv444p",
    times: Sequence[int] | None = None,
    base: Fraction | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    **properties: Any,
) -> Path:
    """A video of RGB or RGBA pictures, lossless where the codec can; `times` in units of `base`."""
    lossless = {"crf": "0"} if codec.startswith("libx264") else {}
    matrix = properties.get("colorspace", 5)
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=lossless | (options or {}))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if base is not None:
            stream.codec_context.time_base = stream.time_base = base
        for name, value in properties.items():
            setattr(stream.codec_context, name, value)
        for index, picture in enumerate(pictures):
            whole = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            frame = whole.reformat(
                format=pix_fmt, dst_colorspace=5 if matrix == 6 else matrix,
                dst_color_range=properties.get("color_range", 1), interpolation="BICUBIC",
            )  # fmt: skip
            frame.pts = index if times is None else times[index]
            frame.time_base = base or 1 / Fraction(rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def pipeline(
    size: tuple[int, int] = (32, 48), fps: float = 24, window: int | None = 3, first: int = 3
) -> Any:
    """What `read_start` looks at: one or more chunks of 3 latent frames of 4 frames each."""
    config = {"frames_per_chunk": 3, "first_chunk_frames": first, "window_frames": window}
    return SimpleNamespace(
        size=size,
        fps=fps,
        student=SimpleNamespace(config=config),
        vae=SimpleNamespace(frames=lambda latent: 1 + 4 * (latent - 1)),
    )


def clear(alpha: int = 128) -> Pixels:
    """`CORNERS`, its left half transparent, its upper right one by `alpha`."""
    picture = np.concatenate([CORNERS, np.full((32, 48, 1), 255, np.uint8)], 2)
    picture[:, :24, 3] = 0
    picture[:16, 24:, 3] = alpha
    return picture


def over_white(picture: Pixels) -> NDArray[np.float64]:
    share = picture[..., 3:] / 255
    return picture[..., :3] * share + 255 * (1 - share)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
