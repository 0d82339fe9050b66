"""Videos as players show them: what a file says about itself is honoured, or refused by name."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from media import (
    COLOURS,
    CORNERS,
    bytes_of,
    chunk,
    clear,
    greys,
    over_white,
    pipeline,
    steps_of,
    write,
)
from PIL import Image
from torch import Tensor

from stream_r1.sampling.start import read_start
from stream_r1.sampling.video import VideoWriter, read_video
from stream_r1.sampling.video_file import VideoFile


def seen_at(times: Sequence[int], fps: float, count: int) -> list[int]:
    """Which frame, of those that come at `times` in milliseconds, is seen at k / fps, up to 1 ms late."""
    return [sum(time <= 1000 * k / fps + 1 for time in times) - 1 for k in range(count)]


# (a, b, c, d) of a display matrix: column x and row y are shown at (a x + c y, b x + d y)
MATRICES = [(1, 0, 0, 1), (-1, 0, 0, 1), (-1, 0, 0, -1), (1, 0, 0, -1)]


def with_matrix(path: Path, a: float, b: float, c: float, d: float) -> None:
    """The display matrix of an mp4's only track, overwritten."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # of a version 0 box
    numbers = [int(65536 * value) for value in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]
    data[at : at + 36] = struct.pack(">9i", *numbers)
    path.write_bytes(data)


@pytest.mark.parametrize("matrix", MATRICES)
def test_videos_are_turned_as_their_matrix_says(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = write(tmp_path / "a.mp4", [CORNERS] * 2)
    plain = bytes_of(read_video(path)[0])[0]
    with_matrix(path, *matrix)
    a, b, c, d = matrix
    rows, columns = np.mgrid[: plain.shape[0], : plain.shape[1]]
    across, down = a * columns + c * rows, b * columns + d * rows
    expected = np.zeros((int(np.ptp(down)) + 1, int(np.ptp(across)) + 1, 3), int)
    expected[down - down.min(), across - across.min()] = plain
    assert np.array_equal(bytes_of(read_video(path)[0])[0], expected)


def test_a_slanted_matrix_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [CORNERS] * 2)
    with_matrix(path, 0.7071, 0.7071, -0.7071, 0.7071)
    with pytest.raises(ValueError, match=r"a\.mp4.*quarters.*0\.707"):
        read_video(path)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        path = write(tmp_path / name, [CORNERS] * 12, sample_aspect_ratio=Fraction(4, 3))
        video, _ = read_video(path)
        assert video.shape == (12, 3, 32, 64)
        corners = bytes_of(video)[0][[2, 2, -3, -3], [2, -3, 2, -3]]
        assert np.abs(corners - COLOURS).max() <= 3
        with pytest.raises(ValueError, match=r"expected 32x48 .* got 32x64"):
            read_start(path, pipeline())


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("fps", [10, 16, 24, 60])
def test_time_stamps_decide(tmp_path: Path, suffix: str, fps: int) -> None:
    times = [0, 100, 151, 400, 411, 420, 1001, 1040, 1080]  # milliseconds
    path = write(tmp_path / f"a.{suffix}", greys(9), times=times, base=Fraction(1, 1000), options={"bf": "0"})
    video, rate = read_video(path, fps=fps)
    assert rate == fps
    assert steps_of(video) == seen_at(times, fps, len(video))
    assert 1.04 <= (len(video) - 1) / fps < 1.08 + 1 / 8  # the last is shown for a mean time, or less


@pytest.mark.parametrize("rate", [12, 24, Fraction(24000, 1001), 25, 30, 48])
def test_starts_are_at_the_streams_rate(tmp_path: Path, rate: Fraction | int) -> None:
    path = write(tmp_path / "a.mkv", greys(24), rate=rate)  # time stamps rounded to milliseconds
    times = [round(float(1000 * index / Fraction(rate))) for index in range(24)]
    total = math.ceil(24 * 24 / Fraction(rate) - Fraction(1, 40))
    start = read_start(path, pipeline())
    assert steps_of(start.frames[0]) == seen_at(times, 24, total)[-9:]
    assert start.meaning == f"the last 9 of {total} frames"


def test_an_edit_list_cuts_the_beginning_off(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", greys(24), options={"bf": "0"}, container={"use_editlist": "1"})
    assert steps_of(read_video(path)[0]) == list(range(24))
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 4 + 8 + 4
    with av.open(str(path)) as file:
        ticks = int(5 / 24 / file.streams.video[0].time_base)
    data[at : at + 4] = struct.pack(">i", ticks)  # media_time: the first five frames are not shown
    path.write_bytes(data)
    assert steps_of(read_video(path)[0]) == list(range(5, 24))


def test_a_late_first_frame_is_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", greys(9), times=[48 + index for index in range(9)])
    assert steps_of(read_start(path, pipeline()).frames[0]) == list(range(9))


def test_fields_become_whole_frames(tmp_path: Path) -> None:
    pictures = []
    for index in range(12):
        picture = np.zeros((32, 48, 3), np.uint8)
        picture[0::2, 4 * index : 4 * index + 8] = COLOURS[0]  # a bar that moves between the fields
        picture[1::2, 4 * index + 2 : 4 * index + 10] = COLOURS[0]
        pictures.append(picture)
    options = {"x264-params": "interlaced=1:tff=1"}
    path = write(
        tmp_path / "a.mkv", pictures, pix_fmt="yuv420p", options=options, colorspace=1, color_range=1
    )
    with av.open(str(path)) as file:
        assert next(file.decode(video=0)).interlaced_frame
    video, _ = read_video(path)
    assert len(video) == 12

    def combs(frame: Tensor) -> float:
        return (frame[:, 1:-1] - (frame[:, :-2] + frame[:, 2:]) / 2).abs().mean().item()

    woven = torch.from_numpy(pictures[6]).movedim(-1, 0) / 255
    assert combs(video[6]) < combs(woven) / 10
    brightest = bytes_of(video)[6][16, 27]  # inside the bar, by the matrix that the file states
    assert np.abs(brightest - COLOURS[0]).max() <= 4


MATRIX = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 5, 6, 7, 9, 2])
def test_colours_by_the_matrix_and_range_that_are_stated(
    tmp_path: Path, matrix: int, full: bool, bits: int
) -> None:
    """Planes by the equations of BT.601 and BT.709, in a codec that keeps them."""
    red, blue = MATRIX.get(matrix, MATRIX[5])  # nothing said, few rows: BT.601
    r, g, b = np.moveaxis(CORNERS / 255.0, -1, 0)
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - luma) / (2 * (1 - blue)), (r - luma) / (2 * (1 - red))
    low, size = (0.0, 255.0) if full else (16.0, 219.0)
    wide = 255.0 if full else 224.0
    planes = [(low + size * luma), *(128 + wide * part for part in chroma)]
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv444p" if bits == 8 else "yuv444p10le"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        frame = av.VideoFrame(48, 32, stream.pix_fmt)
        for plane, values in zip(frame.planes, planes, strict=True):
            scaled = (values * (1023 / 255 if full and bits == 10 else 2 ** (bits - 8))).round()
            samples = np.zeros(
                (32, plane.line_size // (1 + bits // 10)), np.uint8 if bits == 8 else np.uint16
            )
            samples[:, :48] = scaled
            plane.update(samples.tobytes())
        frame.pts = 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert np.abs(bytes_of(read_video(path)[0])[0] - CORNERS).max() <= 2


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("qtrle", "argb", "mov"),
        ("ffv1", "yuva444p", "mkv"),
        ("prores_ks", "yuva444p10le", "mov"),
        ("png", "rgba", "mov"),
    ],
)
def test_clear_videos_are_shown_over_white(tmp_path: Path, codec: str, pix_fmt: str, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}", [clear()] * 3, codec=codec, pix_fmt=pix_fmt)
    shown = bytes_of(read_video(path)[0])[1]
    assert np.abs(shown - over_white(clear()))[4:-4, 4:20].max() <= 2
    assert np.abs(shown - over_white(clear()))[4:12, 28:-4].max() <= 3


@pytest.mark.parametrize(
    ("tags", "told"),
    [
        ({"color_trc": 16, "color_primaries": 9, "colorspace": 9}, "SMPTE2084"),
        ({"color_trc": 18, "color_primaries": 9, "colorspace": 9}, "ARIB_STD_B67"),
        ({"color_trc": 1, "color_primaries": 12, "colorspace": 1}, "SMPTE432"),
        ({"color_trc": 8}, "LINEAR"),
    ],
)
def test_colours_beyond_the_standard_range_are_refused(
    tmp_path: Path, tags: dict[str, int], told: str
) -> None:
    path = write(tmp_path / "a.mkv", [CORNERS] * 12, color_range=1, **tags)
    with pytest.raises(ValueError, match=rf"a\.mkv.*{told}"):
        read_start(path, pipeline())


def _bomb(path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))))


def _half(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _sound(path: Path) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def _playlist(path: Path) -> None:
    write(path.with_name("part.ts"), [CORNERS] * 12, pix_fmt="yuv420p")
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npart.ts\n#EXT-X-ENDLIST\n")


@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        ("bomb.png", _bomb, "pixels"),
        ("half.png", _half, "truncated"),
        ("half.mp4", lambda path: path.write_bytes(write(path, [CORNERS] * 24).read_bytes()[:900]), "read"),
        ("empty.mp4", Path.touch, "read"),
        ("empty.png", Path.touch, "read"),
        ("sound.mp4", _sound, "no video stream"),
        ("list.m3u8", _playlist, "read"),
        ("float.tif", lambda path: Image.fromarray(np.ones((32, 48), np.float32)).save(path), "mode F"),
        (
            "pages.tif",
            lambda path: Image.fromarray(CORNERS).save(
                path, save_all=True, append_images=[Image.fromarray(CORNERS)]
            ),
            "2 pages",
        ),
        (
            "clear.webm",
            lambda path: write(path, [clear()] * 12, codec="libvpx-vp9", pix_fmt="yuva420p"),
            "alpha_mode",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], object], told: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}.*{told}") as error:
        read_start(tmp_path / name, pipeline())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_only_the_end_is_decoded_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "long.mp4", greys(50, 5) * 40, pix_fmt="yuv420p", options={"g": "24"})  # 83 s
    decoded = 0

    frames = VideoFile._frames

    def counted(self: Any) -> Any:
        nonlocal decoded
        for frame in frames(self):
            decoded += 1
            yield frame

    monkeypatch.setattr(VideoFile, "_frames", counted)
    start = read_start(path, pipeline())
    assert start.meaning == "the last 9 of 2000 frames"
    assert steps_of(start.frames[0], 5) == list(range(41, 50))
    assert decoded < 100
    with pytest.raises(ValueError, match=r"max_pixels.*got more"):
        read_video(path, max_pixels=32 * 48 * 100)
    with pytest.raises(ValueError, match=r"max_pixels.*got 32 x 48"):
        read_video(path, max_pixels=1000)
    with pytest.raises(ValueError, match="max_pixels"):
        read_start(path, pipeline(window=None), max_pixels=32 * 48 * 100)
    with pytest.raises(ValueError, match=r"expected 64x64 .* got 32x48"):
        read_start(path, pipeline((64, 64)))


def test_a_damaged_end_is_told(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (48, 32, 48, 3), np.uint8)
    path = write(tmp_path / "a.mp4", list(noise), container={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.warns(RuntimeWarning, match=r"a\.mp4.*as far as it goes"):
        video, _ = read_video(path)
    assert 12 <= len(video) < 48
    start = read_start(path, pipeline())
    assert "damaged" in start.meaning
    assert torch.equal(start.frames[0], video[-9:])


@pytest.mark.parametrize("size", [(64, 112), (720, 1280)])
def test_written_files_state_their_colours(tmp_path: Path, size: tuple[int, int]) -> None:
    """Decoded by the tags alone, with the equations of BT.709, the colours are those that were made."""
    rows, columns = size
    video = torch.from_numpy(COLOURS).float().div(255).view(2, 2, 3)
    video = video.repeat_interleave(rows // 2, 0).repeat_interleave(columns // 2, 1).permute(2, 0, 1)[None]
    path = tmp_path / "a.mp4"
    with VideoWriter(path, crf=1) as writer:
        writer.write(video)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frame = next(file.decode(stream))
        stated = (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc)
        assert stated == (1, 1, 1, 1)
        planes = [np.frombuffer(bytes(p), np.uint8).reshape(-1, p.line_size) for p in frame.planes]
    assert b"nclx" in path.read_bytes()  # the container says it too
    red, blue = MATRIX[1]
    for row, column in np.ndindex(2, 2):
        place = (rows // 4 + row * rows // 2, columns // 4 + column * columns // 2)
        y = (planes[0][place] - 16.0) / 219
        u, v = ((plane[place[0] // 2, place[1] // 2] - 128.0) / 224 for plane in planes[1:])
        r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
        colour = 255 * np.array([r, (y - red * r - blue * b) / (1 - red - blue), b])
        assert np.abs(colour - COLOURS[2 * row + column]).max() <= 2
    assert (read_video(path)[0] - video)[..., 4:20, 4:20].abs().max() <= 2 / 255
