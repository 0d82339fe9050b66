"""Video files as a player shows them: upright, with square pixels, in their time and their colours."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from numpy.typing import NDArray
from torch import Tensor

from stream_r1.sampling.footage import MAX_PIXELS, Footage, Shown, at_rate, check_area

# Containers and streams of one file; no playlists, which name other files and addresses.
_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,ogg,flv,asf,mxf,nut,dv,"
    "yuv4mpegpipe"
)
# Between the families of standard dynamic range players make no difference; other transfers are another
# picture.
_TRANSFERS = (
    ColorTrc.UNSPECIFIED,
    ColorTrc.BT709,
    ColorTrc.GAMMA22,
    ColorTrc.SMPTE170M,
    ColorTrc.SMPTE240M,
    ColorTrc.IEC61966_2_4,
    ColorTrc.IEC61966_2_1,
    ColorTrc.BT2020_10,
    ColorTrc.BT2020_12,
)
_PRIMARIES = (
    ColorPrimaries.UNSPECIFIED,
    ColorPrimaries.BT709,
    ColorPrimaries.BT470BG,
    ColorPrimaries.SMPTE170M,
    ColorPrimaries.SMPTE240M,
)
_RGB, _UNSPECIFIED = 0, 2  # of a frame's matrix, beside those that swscale converts by
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,  # 625 lines
    6: Colorspace.ITU601,  # 525 lines
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_MARGIN = 1  # second that is decoded before the frames that are wanted


class VideoFile:
    """A video file, opened and looked at; a context manager.

    What the file says is honoured: rotation and mirroring, sample aspect ratio (the width is scaled), time
    stamps and edit lists, interlacing, bit depth, matrix and range (BT.709 from 720 rows on and BT.601 below
    where it says nothing), transparency (over white).

    Args:
        path: of anything that PyAV reads, in one file.
        max_pixels: of one frame, and of all that are read together.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video, one without a frame, more pixels, or what it says can't be honoured: high
            dynamic range, wide gamut, a rotation by other than quarters, transparency of VP8 and VP9.
    """

    def __init__(self, path: str | Path, *, max_pixels: int = MAX_PIXELS) -> None:
        self.path = Path(path)
        self._max_pixels = max_pixels
        if not self.path.is_file():
            raise FileNotFoundError(f"read_video: no such file: {path}")
        self._open()
        try:
            codec, stream = self._stream.codec_context, self._stream
            check_area(codec.height, codec.width, max_pixels, str(path))
            self._damage: str | None = None
            first = next(self._frames(), None)
            if first is None:
                raise ValueError(f"{path} has no frames" + (f": {self._damage}" if self._damage else ""))
            rate = stream.average_rate or stream.guessed_rate
            self.fps = Fraction(rate) if rate else Fraction(25)
            self._began = self._time(first) or Fraction(0)
            self._stored = (first.height, first.width)
            self._turn = _display_matrix(first, str(path))
            aspect = stream.sample_aspect_ratio or codec.sample_aspect_ratio or Fraction(1)
            self._square = (first.height, max(1, round(first.width * aspect)))
            height, width = self._square
            self.size = (width, height) if self._turn[0, 0] == 0 else (height, width)
            check_area(height, width, max_pixels, str(path))
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def read(
        self, fps: float | Fraction | None = None, *, first: int | None = None, last: int | None = None
    ) -> Footage:
        """Frames at `fps` a second (None: the file's own), all, the first or the last so many.

        Only what is needed is kept, and of a file that can be searched only its end is decoded for the last
        ones. A file that is damaged ends where it is; `Footage.damage` says so.

        Raises:
            ValueError: more than `max_pixels`, or frames that change size or colours that can't be honoured.
        """
        rate = self.fps if fps is None else Fraction(fps).limit_denominator(1001)
        # at the file's own rate every frame once, however its time stamps tremble
        early = 1 / rate / 2 if fps is None else Fraction(1, 1000)
        most = max(1, self._max_pixels // (self.size[0] * self.size[1]))
        frames: list[av.VideoFrame] = []
        total = 0
        for seek in (True, False):
            self._rewind(rate, last if seek else None)
            frames, total = at_rate(
                self._shown(), rate, first=first, last=last, most=most, early=early, source=str(self.path)
            )
            if last is None or len(frames) == last or not self._searched:
                break
        pixels = torch.empty((len(frames), 3, *self.size))
        done: tuple[av.VideoFrame | None, Tensor] = (None, pixels)
        for place, frame in zip(pixels, frames, strict=True):
            if frame is not done[0]:  # frames that are repeated are converted once
                done = (frame, torch.from_numpy(self._picture(frame)).permute(2, 0, 1))
            place.copy_(done[1])
        enough = first is not None and len(frames) == first  # what is damaged behind them does not matter
        return Footage(pixels.div_(255), float(rate), total, None if enough else self._damage)

    def pieces(self, frames: int) -> Iterator[Tensor]:
        """Every frame once, in order, so many at a time: [t, 3, H, W] float32 in [0, 1].

        Raises:
            ValueError: the file is damaged, after what comes before that.
        """
        self._rewind(self.fps, None)
        waiting: list[av.VideoFrame] = []
        for shown in self._shown():
            waiting.append(shown.frame)
            if len(waiting) == frames:
                yield self._pixels(waiting)
                waiting = []
        if waiting:
            yield self._pixels(waiting)
        if self._damage:
            raise ValueError(f"{self.path}: expected a whole video: {self._damage}")

    def _pixels(self, frames: list[av.VideoFrame]) -> Tensor:
        pixels = torch.from_numpy(np.stack([self._picture(frame) for frame in frames]))
        return pixels.movedim(3, 1).float().div_(255)

    def _open(self) -> None:
        try:
            # resolved: a name is never taken for a protocol
            self._container = av.open(str(self.path.resolve()), options={"format_whitelist": _FORMATS})
        except (av.FFmpegError, ValueError) as error:
            reason = f"cannot be read as a video: {_reason(error)}"
            raise ValueError(f"read_video: {self.path} {reason}") from error
        covers = av.stream.Disposition.attached_pic
        streams = [s for s in self._container.streams.video if not s.disposition & covers]
        if not streams:
            self._container.close()
            raise ValueError(f"read_video: {self.path} has no video stream")
        self._stream = streams[0]
        self._searched = False
        if self._stream.metadata.get("alpha_mode") == "1":
            self._container.close()
            raise ValueError(
                f"read_video: {self.path}: expected pictures without transparency, got "
                f"{self._stream.codec_context.name} with alpha_mode, of which colours alone can be decoded"
            )

    def _rewind(self, rate: Fraction, last: int | None) -> None:
        """To the beginning, or to what has the last frames in it."""
        self._container.close()
        self._open()
        self._damage = self._cut()
        stream = self._stream
        if last is None or stream.duration is None or stream.time_base is None or self._damage:
            return
        wanted = stream.duration * stream.time_base - last / rate - _MARGIN
        if wanted <= _MARGIN:
            return
        try:
            self._container.seek(int((self._began + wanted) / stream.time_base), stream=stream)
            self._searched = True
        except av.FFmpegError:  # it can't be searched
            self._container.close()
            self._open()

    def _cut(self) -> str | None:
        """Whether the file's own index reaches beyond its end."""
        size = self.path.stat().st_size
        if any(entry.pos + entry.size > size for entry in self._stream.index_entries):
            return "it ends before its last frame"
        return None

    def _time(self, frame: av.VideoFrame) -> Fraction | None:
        return None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base

    def _shown(self) -> Iterator[Shown[av.VideoFrame]]:
        """Frames with the time in which each is seen: until the next comes, the last as long as it says."""
        waiting: tuple[av.VideoFrame, Fraction] | None = None
        for frame in self._frames():
            if (frame.height, frame.width) != self._stored:
                expected = f"frames of {self._stored[0]} x {self._stored[1]} as the first"
                raise ValueError(f"{self.path}: expected {expected}, got {frame.height} x {frame.width}")
            begin = self._time(frame)
            if waiting is None:
                waiting = (frame, Fraction(0) if begin is None else begin - self._began)
                continue
            after = waiting[1] + self._lasts(waiting[0]) if begin is None else begin - self._began
            after = max(after, waiting[1])
            yield Shown(*waiting, after)
            waiting = (frame, after)
        if waiting is not None:
            yield Shown(*waiting, waiting[1] + self._lasts(waiting[0]))

    def _lasts(self, frame: av.VideoFrame) -> Fraction:
        if frame.duration and frame.time_base is not None:
            return frame.duration * frame.time_base
        return 1 / self.fps

    def _frames(self) -> Iterator[av.VideoFrame]:
        """Decoded frames, progressive, up to the first that is damaged."""
        whole: av.filter.Graph | None = None  # makes whole frames of fields
        try:
            for frame in self._container.decode(self._stream):
                if frame.is_corrupt:
                    self._damage = "a frame is damaged"
                    break
                if frame.interlaced_frame and whole is None:
                    whole = _deinterlacer(self._stream)
                if whole is None:
                    yield frame
                    continue
                whole.vpush(frame)
                yield from _pulled(whole)
        except av.FFmpegError as error:
            self._damage = _reason(error)
        if whole is not None:
            whole.vpush(None)
            yield from _pulled(whole)

    def _picture(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """[H, W, 3] RGB of full range as it is shown."""
        clear = any(component.is_alpha for component in frame.format.components) or frame.format.has_palette
        matrix = self._matrix(frame)
        height, width = self._square
        shown: NDArray[Any] = frame.reformat(
            width,
            height,
            "rgba" if clear else "rgb24",
            src_colorspace=matrix,
            interpolation=_EXACT,
            src_color_range=frame.color_range,
            dst_color_range=ColorRange.JPEG,
        ).to_ndarray()
        if clear:
            shown = over_white(shown)
        across, down = self._turn
        if across[0] == 0:
            shown = shown.transpose(1, 0, 2)
        return np.ascontiguousarray(shown[:: int(down.sum()), :: int(across.sum())])

    def _matrix(self, frame: av.VideoFrame) -> Colorspace:
        """What converts the frame to RGB, or ValueError for colours that can't be shown as they are meant."""
        for what, value, known, names in (
            ("transfer", frame.color_trc, _TRANSFERS, ColorTrc),
            ("primaries", frame.color_primaries, _PRIMARIES, ColorPrimaries),
        ):
            if value not in known and value != 0:
                got = next((name.name for name in names if name == value), value)
                raise ValueError(
                    f"{self.path}: expected colours of standard range (BT.709, BT.601, sRGB), got {what} "
                    f"{got} (high dynamic range or wide gamut); convert it to BT.709 first"
                )
        if frame.colorspace in _MATRICES:
            return _MATRICES[frame.colorspace]
        if frame.colorspace not in (_RGB, _UNSPECIFIED):
            known_ones = "RGB, BT.709, BT.601, SMPTE 240M, FCC or BT.2020"
            raise ValueError(f"{self.path}: expected a matrix of {known_ones}, got number {frame.colorspace}")
        return Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601


def over_white(shown: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., 4] RGBA -> [..., 3]: what is transparent shows white, whatever colour is hidden there."""
    alpha = shown[..., 3:].astype(np.uint16)
    return ((shown[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _display_matrix(frame: av.VideoFrame, source: str) -> NDArray[np.int64]:
    """[[a, c], [b, d]] of -1, 0 and 1: the frame's column x and row y are shown at (a x + c y, b x + d y)."""
    side_data: Any = frame.side_data  # typed as if its keys were numbers
    data = side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return np.eye(2, dtype=np.int64)
    (a, b), (c, d) = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2] / 65536
    matrix = np.array([[a, c], [b, d]])
    turn = np.sign(matrix.round(1)).astype(np.int64)
    if (np.abs(turn).sum(0) != 1).any() or (np.abs(turn).sum(1) != 1).any():
        raise ValueError(
            f"{source}: expected a rotation by quarters of a turn or a mirroring, got the display matrix "
            f"{matrix.round(3).tolist()}"
        )
    return turn


def _deinterlacer(stream: av.VideoStream) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(template=stream)
    whole = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(source, whole, graph.add("buffersink")).configure()
    return graph


def _pulled(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0]
