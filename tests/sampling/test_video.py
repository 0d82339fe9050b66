"""Video files and contact sheets, and what is left of a file when its writer dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stream_r1.sampling.video import VideoWriter, contact_sheet, read_video


def clip(frames: int, height: int = 16, width: int = 24) -> Tensor:
    """A smooth picture whose brightness tells the frame: [T, 3, H, W]."""
    rows, columns = torch.linspace(0, 0.3, height), torch.linspace(0, 0.3, width)
    picture = (rows[:, None] + columns).expand(3, -1, -1)
    return picture + torch.linspace(0, 0.4, frames)[:, None, None, None]


def psnr(a: Tensor, b: Tensor) -> float:
    return (-10 * (a - b).square().mean().log10()).item()


@pytest.mark.parametrize("size", [(16, 24), (15, 23), (1, 1)])
def test_what_is_written_is_read(tmp_path: Path, size: tuple[int, int]) -> None:
    video = clip(30, *size)
    with VideoWriter(tmp_path / "deep" / "a.mp4", fps=24) as writer:
        for piece in video.split((9, 12, 9)):
            writer.write(piece)
    read, fps = read_video(tmp_path / "deep" / "a.mp4")
    assert fps == 24
    assert writer.frames == 30
    # odd sizes: the last row and column once more
    assert read.shape == (30, 3, size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert psnr(read[..., : size[0], : size[1]], video) > 38
    assert (read.mean((1, 2, 3)).diff() > 0).all()  # every frame, in order


def test_bytes_and_enlargement(tmp_path: Path) -> None:
    video = clip(4)
    for enlarge in ("nearest", "bicubic"):
        with VideoWriter(tmp_path / f"{enlarge}.mp4", scale=3, enlarge=enlarge) as writer:
            writer.write((video * 255).round().to(torch.uint8))
    nearest, _ = read_video(tmp_path / "nearest.mp4")
    bicubic, _ = read_video(tmp_path / "bicubic.mp4")
    assert nearest.shape == bicubic.shape == (4, 3, 48, 72)
    assert psnr(nearest, video.repeat_interleave(3, 2).repeat_interleave(3, 3)) > 35
    assert psnr(bicubic, nearest) > 30


def test_a_fractional_rate(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", fps=23.976) as writer:
        writer.write(clip(3))
    assert read_video(tmp_path / "a.mp4")[1] == pytest.approx(23.976, abs=0.01)


def test_the_file_plays_while_it_is_written(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", fps=24)
    writer.write(clip(60)[:30])
    read, _ = read_video(tmp_path / "a.mp4")
    assert len(read) >= 24  # the last fragment, half a second at most, is still open
    writer.write(clip(60)[30:])
    writer.close()
    writer.close()
    assert len(read_video(tmp_path / "a.mp4")[0]) == 60


def test_the_file_outlives_a_killed_writer(tmp_path: Path) -> None:
    program = f"""
import os, signal, torch
from stream_r1.sampling.video import VideoWriter
writer = VideoWriter({str(tmp_path / "a.mp4")!r}, fps=24)
for index in range(40):
    writer.write(torch.full((1, 3, 16, 24), index / 40))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    read, fps = read_video(tmp_path / "a.mp4")
    assert fps == 24
    assert 28 <= len(read) <= 40
    torch.testing.assert_close(read.mean((1, 2, 3)), torch.arange(len(read)) / 40, atol=0.02, rtol=0)


def test_a_cut_file_gives_what_it_has(tmp_path: Path) -> None:
    grain = torch.rand(48, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(clip(48) + 0.05 * grain)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) * 3 // 4])
    with pytest.warns(RuntimeWarning, match="as far as it goes"):
        assert 12 <= len(read_video(tmp_path / "a.mp4")[0]) < 48
    assert len(read_video(tmp_path / "a.mp4", max_frames=5)[0]) == 5


def test_contact_sheet() -> None:
    videos = [clip(9), clip(3)]
    sheet = contact_sheet(videos, columns=5, gap=2, scale=2, labels=["one", "two"])
    assert sheet.size == (2 + 5 * (48 + 2), 2 + 2 * (14 + 32 + 2))
    pixels = torch.tensor(list(sheet.convert("RGB").tobytes())).reshape(sheet.height, sheet.width, 3)
    for column, frame in enumerate([0, 2, 4, 6, 8]):
        expected = (videos[0][frame] * 255).round().repeat_interleave(2, 1).repeat_interleave(2, 2)
        left = 2 + column * 50
        assert torch.equal(pixels[16:48, left : left + 48].permute(2, 0, 1), expected.long())
    assert (pixels[64:96, 2 + 3 * 50 :] == 24).all()  # a shorter video leaves its row empty
    assert contact_sheet(torch.rand(2, 4, 3, 8, 8)).size == (4 + 4 * 12, 4 + 2 * 12)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.mp4"):
        VideoWriter(tmp_path / "a.avi")
    with pytest.raises(ValueError, match="fps must be positive"):
        VideoWriter(tmp_path / "a.mp4", fps=0)
    with pytest.raises(ValueError, match="scale must be a whole number"):
        VideoWriter(tmp_path / "a.mp4", scale=0)
    with pytest.raises(ValueError, match="'nearest' or 'bicubic', got 'lanczos'"):
        VideoWriter(tmp_path / "a.mp4", enlarge="lanczos")  # type: ignore[arg-type]
    with VideoWriter(tmp_path / "a.mp4") as writer:
        with pytest.raises(ValueError, match=r"\[T, 3, H, W\], got \[3, 8, 8\]"):
            writer.write(torch.zeros(3, 8, 8))
        with pytest.raises(TypeError, match="int64"):
            writer.write(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
        writer.write(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError, match="must be 8 x 8 as before, got 8 x 10"):
            writer.write(torch.zeros(1, 3, 8, 10))
    with pytest.raises(ValueError, match="is closed"):
        writer.write(torch.zeros(1, 3, 8, 8))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_video(tmp_path / "nothing.mp4")
    (tmp_path / "b.mp4").write_bytes(b"not a video")
    with pytest.raises(ValueError, match="cannot be read"):
        read_video(tmp_path / "b.mp4")
    with pytest.raises(ValueError, match="one a video, got 1"):
        contact_sheet(torch.rand(2, 4, 3, 8, 8), labels=["a"])
    with pytest.raises(ValueError, match="frames of one size"):
        contact_sheet([clip(2), clip(2, 8, 8)])
    with pytest.raises(ValueError, match="expected videos"):
        contact_sheet([])
