"""`stream-r1 sample`: mp4 files of the asked length, the same for the same seed, going on from a video."""

import pytest
import torch

from stream_r1.cli import main
from stream_r1.sampling.video import read_video


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return end.value.code or 0


def test_two_prompts_twice(world, tmp_path, capsys):
    sizes = ("--models", world, "--size", "32x48", "--seconds", 0.8)
    for name in ("a", "b"):
        assert (
            run("sample", "a rabbit", "an apple", *sizes, "--out", tmp_path / name / "it.mp4", "--sheet") == 0
        )
    told = capsys.readouterr().out
    assert "frames a second" in told
    videos = {}
    for name in ("a", "b"):
        for index in range(2):
            video, fps = read_video(tmp_path / name / f"it-{index}.mp4")
            assert fps == 24
            assert video.shape == (9 + 12, 3, 32, 48)  # two chunks: the first has 1 + 2 * 4 frames
            videos[name, index] = video
        assert (tmp_path / name / "it.png").is_file()
    assert torch.equal(videos["a", 0], videos["b", 0])
    assert not torch.equal(videos["a", 0], videos["a", 1])

    start = tmp_path / "a" / "it-0.mp4"
    assert run("sample", "a rabbit", *sizes, "--out", tmp_path / "on.mp4", "--start", start) == 0
    assert read_video(tmp_path / "on.mp4")[0].shape == (24, 3, 32, 48)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--size", "32"), "--size: expected height x width"),
        (("--size", "30x48"), "multiples of (16, 16)"),
        (("--out", "it.avi"), "ends in .mp4"),
        (("--checkpoint", "nowhere"), "nowhere"),
        (("--preset", "reward"), "reward-forcing"),
    ],
)
def test_refuses(world, capsys, arguments, told):
    assert run("sample", "a rabbit", "--models", world, *arguments) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert "Traceback" not in shown
